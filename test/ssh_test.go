package test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
)

// serveSSH serves one connection: each session runs the command "echo", which
// is what the client asks for, and ends well.
func serveSSH(c net.Conn, config *ssh.ServerConfig, handled *atomic.Int64) error {
	defer c.Close()
	_, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(requests)
	for ch := range channels {
		channel, requests, err := ch.Accept()
		if err != nil {
			return err
		}
		for r := range requests {
			if r.Type != "exec" {
				r.Reply(false, nil)
				continue
			}
			var command struct{ Line string }
			if err := ssh.Unmarshal(r.Payload, &command); err != nil {
				return err
			}
			handled.Add(1)
			r.Reply(true, nil)
			fmt.Fprint(channel, command.Line)
			channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
			channel.Close()
		}
	}
	return nil
}

// An SSH server, with a handshake and two sessions in each connection, four of
// which are open at a time.
func TestSSH(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	require.NoError(t, err)
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(signer)

	inRows(t, func(t *testing.T, g *group) {
		var handled, bad, number atomic.Int64
		var conns sync.WaitGroup
		served := g.start(func(l net.Listener) error {
			for {
				c, err := l.Accept()
				if err != nil {
					return err
				}
				conns.Add(1)
				go func() {
					defer conns.Done()
					if err := serveSSH(c, config, &handled); err != nil {
						t.Log(err)
						bad.Add(1)
					}
				}()
			}
		})
		l := startLoad(t, 4, func() error {
			c, err := g.dial(context.Background())
			if err != nil {
				return err
			}
			conn, channels, requests, err := ssh.NewClientConn(c, g.addr(), &ssh.ClientConfig{HostKeyCallback: ssh.FixedHostKey(signer.PublicKey())})
			if err != nil {
				c.Close()
				return err
			}
			client := ssh.NewClient(conn, channels, requests)
			defer client.Close()
			for range 2 {
				session, err := client.NewSession()
				if err != nil {
					return err
				}
				want := strconv.FormatInt(number.Add(1), 10)
				got, err := session.Output(want)
				if err != nil {
					return err
				}
				if string(got) != want {
					return fmt.Errorf("%q came back for %q", got, want)
				}
			}
			return nil
		})
		g.leave(t, l, count(12, 4))
		l.end(t, g)
		require.NoError(t, g.close())
		require.NoError(t, wait(t, served))
		conns.Wait()
		require.Equal(t, 2*l.answered.Load(), handled.Load())
		require.Zero(t, bad.Load())
	})
}
