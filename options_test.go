//go:build linux || freebsd || dragonfly || netbsd

package lblisten

import (
	"context"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// keepAliveOf returns the options that package net sets on an accepted
// connection; those of keep-alive only if it is on.
func keepAliveOf(t testing.TB, c net.Conn) map[string]int {
	t.Helper()
	conn, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	options := make(map[string]int)
	get := func(name string, level, opt int) {
		require.NoError(t, control(conn, func(fd uintptr) error {
			v, err := unix.GetsockoptInt(int(fd), level, opt)
			options[name] = v
			return err
		}), name)
	}
	get("TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY)
	get("SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE)
	if options["SO_KEEPALIVE"] != 0 {
		get("TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		get("TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
		get("TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	}
	return options
}

// Connections of an adopted socket have the keep-alive that the adopter asks for.
func TestHandoffKeepsListenConfig(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		for _, lc := range []net.ListenConfig{
			{},
			{KeepAlive: -1},
			{KeepAlive: 33 * time.Second},
			{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 44 * time.Second, Interval: 5 * time.Second, Count: 3}},
		} {
			path := handoffPath(t)
			old := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher})
			opts := []Option{WithHandoff(path), WithListenConfig(lc)}
			if dispatcher {
				opts = append(opts, WithDispatcher())
			}
			keep, err := Listen("tcp", old.Address, opts...) // holds the sockets
			require.NoError(t, err)
			old.kill()
			if !dispatcher {
				require.Eventually(t, func() bool { return keep.(*Listener).Info().Sockets == 3 }, limit(5*time.Second), time.Millisecond)
			}
			adopter, err := Listen("tcp", old.Address, opts...)
			require.NoError(t, err)
			plain, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
			require.NoError(t, err)
			dialTest(t, plain.Addr())
			want := keepAliveOf(t, acceptWithin(t, plain))
			for i := range 12 {
				c := dialTest(t, keep.Addr())
				var got net.Conn
				for got == nil { // of the one or the other
					for _, l := range []net.Listener{keep, adopter} {
						if c, err := acceptBy(l, 5*time.Millisecond); err == nil {
							got = c
							break
						}
					}
				}
				require.Equal(t, want, keepAliveOf(t, got), "connection %d, %+v", i, lc)
				got.Close()
				c.Close()
			}
			plain.Close()
			keep.Close()
			adopter.Close()
		}
	})
}
