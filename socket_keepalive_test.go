//go:build linux || freebsd || dragonfly || netbsd

package lblisten

// The options of accepted connections, whoever opened the socket.

import (
	"context"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// optionsOf returns the options that package net sets on an accepted connection;
// those of keep-alive only if it is on, unless all are asked for.
func optionsOf(t testing.TB, c net.Conn, all ...bool) map[string]int {
	t.Helper()
	conn, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	options := make(map[string]int)
	get := func(name string, level, opt int) {
		require.NoError(t, onFD(conn, func(fd uintptr) error {
			v, err := unix.GetsockoptInt(int(fd), level, opt)
			options[name] = v
			return err
		}), name)
	}
	get("TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY)
	get("SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE)
	if options["SO_KEEPALIVE"] != 0 || all != nil {
		get("TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		get("TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
		get("TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	}
	return options
}

// leftAlone is a ListenConfig as grpc.Server.Serve recommends it: package net leaves
// the keep-alive alone, and Control sets the system's.
var leftAlone = net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
	return onFD(c, func(fd uintptr) (err error) {
		for _, o := range [][3]int{{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 600},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 60}, {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4}} {
			if err == nil {
				err = unix.SetsockoptInt(int(fd), o[0], o[1], o[2])
			}
		}
		return err
	})
}}

var listenConfigs = []net.ListenConfig{
	leftAlone,
	{},
	{KeepAlive: -1},
	{KeepAlive: 33 * time.Second},
	{KeepAlive: 1500 * time.Millisecond},
	{KeepAlive: 1 << 62}, // the system refuses it
	{KeepAliveConfig: net.KeepAliveConfig{Enable: true}},
	{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 44 * time.Second, Interval: 5 * time.Second, Count: 3}},
	{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}},
	{KeepAlive: -1, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Interval: time.Millisecond}},
	{KeepAlive: 20 * time.Second, KeepAliveConfig: net.KeepAliveConfig{Idle: time.Second}},
	{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		return onFD(c, func(fd uintptr) error { return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1) })
	}},
}

// Accepted connections have exactly the options that package net gives them,
// whatever the ListenConfig asks for. A member that adopts a socket gives its own.
func TestAcceptedOptions(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range endpoints {
			t.Run(e.name, func(t *testing.T) {
				e.need(t)
				for i, lc := range listenConfigs {
					plain, err := lc.Listen(context.Background(), e.network, e.listen)
					require.NoError(t, err)
					dial := func(l net.Listener) map[string]int {
						c, err := dialOnce("tcp", e.of(l.Addr()))
						require.NoError(t, err)
						defer c.Close()
						return optionsOf(t, acceptWithin(t, l), true)
					}
					want := dial(plain)
					require.NotZero(t, want["TCP_NODELAY"])
					ln, err := Listen(e.network, e.listen, m.opt, WithListenConfig(lc))
					require.NoError(t, err)
					require.Equal(t, want, dial(ln), "%d: %+v", i, lc)
					require.NoError(t, plain.Close())
					require.NoError(t, ln.Close())
				}
			})
		}
	})
}

func TestAdoptedSocketHasItsAdoptersKeepAlive(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	for i, lc := range listenConfigs {
		if lc.KeepAlive == 1<<62 {
			continue // what the system refuses is as the opener left it
		}
		if k := lc.KeepAliveConfig; k.Idle < 0 || k.Interval < 0 || k.Count < 0 {
			if !connectionsInherit(t) {
				continue // what is the system's is as the opener's package net has set it
			}
		}
		plain, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		dialTest(t, plain.Addr())
		want := optionsOf(t, acceptWithin(t, plain))
		plain.Close()
		_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithLB(), WithListenConfig(net.ListenConfig{KeepAlive: 77 * time.Second}))
		require.NoError(t, ls[0].Close())
		adopter := joinTest(t, ls[1], WithLB(), WithListenConfig(lc))
		require.NoError(t, ls[1].Close())
		ls = []*Listener{adopter, joinTest(t, adopter, WithLB(), WithListenConfig(lc))} // it has the other socket
		for range 8 {
			c := dialTest(t, adopter.Addr())
			var got net.Conn
			for got == nil {
				for _, l := range ls {
					if c, err := acceptBy(l, 5*time.Millisecond); err == nil {
						got = c
						break
					}
				}
			}
			require.Equal(t, want, optionsOf(t, got), "%d: %+v", i, lc)
			got.Close()
			c.Close()
		}
		for _, l := range ls {
			l.Close()
		}
	}
}

// connectionsInherit is whether a connection has the keep-alive of the listening socket.
func connectionsInherit(t *testing.T) bool {
	t.Helper()
	ln, err := leftAlone.Listen(context.Background(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	dialTest(t, ln.Addr())
	return optionsOf(t, acceptWithin(t, ln))["SO_KEEPALIVE"] != 0
}

// Connections of an adopted socket have the keep-alive that the adopter asks for.
func TestHandoffKeepsListenConfig(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		for _, lc := range []net.ListenConfig{
			leftAlone,
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
			want := optionsOf(t, acceptWithin(t, plain))
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
				require.Equal(t, want, optionsOf(t, got), "connection %d, %+v", i, lc)
				got.Close()
				c.Close()
			}
			plain.Close()
			keep.Close()
			adopter.Close()
		}
	})
}
