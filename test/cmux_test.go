package test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/soheilhy/cmux"
	"github.com/stretchr/testify/require"
)

// A patient listener tells of its end when its connections have ended: cmux
// closes those that it hasn't handed on when Accept fails.
type patient struct {
	net.Listener
	open sync.WaitGroup
}

type patientConn struct {
	net.Conn
	once sync.Once
	done func()
}

func (l *patient) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		l.open.Wait()
		return nil, err
	}
	l.open.Add(1)
	return &patientConn{Conn: c, done: l.open.Done}, nil
}

func (c *patientConn) Close() error {
	c.once.Do(c.done)
	return c.Conn.Close()
}

// HTTP and a protocol of lines on one address, and each member has a
// multiplexer of its own.
func TestCmux(t *testing.T) {
	inRows(t, func(t *testing.T, g *group) {
		srv := newHTTPServer()
		srv.ConnContext = nil
		var echoed atomic.Int64
		served := g.start(func(l net.Listener) error {
			m := cmux.New(&patient{Listener: l})
			toHTTP, toLines := m.Match(cmux.HTTP1Fast()), m.Match(cmux.Any())
			var servers sync.WaitGroup
			servers.Add(2)
			go func() {
				defer servers.Done()
				srv.Serve(toHTTP)
			}()
			go func() {
				defer servers.Done()
				for {
					c, err := toLines.Accept()
					if err != nil {
						return
					}
					servers.Add(1)
					go func() {
						defer servers.Done()
						defer c.Close()
						if line, err := bufio.NewReader(c).ReadString('\n'); err == nil {
							echoed.Add(1)
							fmt.Fprint(c, line)
						}
					}()
				}
			}()
			err := m.Serve()
			servers.Wait()
			return err
		})
		clients := newHTTPClients(t, 8, g.http1(false))
		var number, gets, lines atomic.Int64
		l := startLoad(t, 8, func() error {
			n := number.Add(1)
			if n%2 == 0 {
				gets.Add(1)
				return clients.get("http://"+g.addr(), 1)
			}
			lines.Add(1)
			c, err := g.dial(context.Background())
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(limit(20 * time.Second)))
			want := fmt.Sprintf("a line that is longer than what HTTP1Fast reads: %d\n", n)
			if _, err := fmt.Fprint(c, want); err != nil {
				return err
			}
			got, err := bufio.NewReader(c).ReadString('\n')
			if err == nil && got != want {
				err = fmt.Errorf("%q came back for %q", got, want)
			}
			return err
		})
		g.leave(t, l, count(100, 20))
		l.end(t, g)
		require.Equal(t, gets.Load(), srv.handled.Load())
		require.Equal(t, lines.Load(), echoed.Load())
		require.NoError(t, g.close())
		require.NoError(t, wait(t, served))
		srv.Close()
	})
}
