package lblisten

// Opening: one listener, many, all or none.

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Without options, and with those that don't imply WithLB, Listen returns what
// net.Listen returns.
func TestWithoutOptionsIsNetListen(t *testing.T) {
	noLeaks(t)
	for _, opts := range [][]Option{nil, {WithListenConfig(net.ListenConfig{})}, {WithLogger(slog.Default())}} {
		for _, network := range []string{"tcp", "tcp4", "unix"} {
			address := "127.0.0.1:0"
			if network == "unix" {
				if address = socketPath(t); !hasUnixSockets(t) {
					continue
				}
			}
			ln, err := Listen(network, address, opts...)
			require.NoError(t, err)
			want := any((*net.TCPListener)(nil))
			if network == "unix" {
				want = (*net.UnixListener)(nil)
			}
			require.IsType(t, want, ln)
			require.NoError(t, ln.Close())
		}
	}
	if setsBacklog() {
		ln, err := Listen("tcp", "127.0.0.1:0", WithBacklog(3))
		require.NoError(t, err)
		require.IsType(t, (*net.TCPListener)(nil), ln)
		if c, err := ln.(syscall.Conn).SyscallConn(); runtime.GOOS == "linux" && tellsQueues() {
			require.NoError(t, err)
			_, backlog := queuesOf([]syscall.RawConn{c})
			require.Equal(t, 3, backlog)
		}
		require.NoError(t, ln.Close())
	}
}

// ListenGroup returns all members or none.
func TestListenGroupIsAllOrNothing(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		calls := 0
		bad := errors.New("the third fails")
		lc := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
			if calls++; calls == 3 {
				return bad
			}
			return nil
		}}
		g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 5, m.opt, WithListenConfig(lc))
		if m.name == "kernel" {
			require.ErrorIs(t, err, bad)
			return
		}
		require.NoError(t, err) // it opens one socket
		require.NoError(t, g.Close())
	})
}

// Listeners that can't be opened give an error that names the address, and
// nothing of them is left; the group that they were to join goes on.
func TestListenFailsHalfway(t *testing.T) {
	switch runtime.GOOS {
	case "plan9", "js", "wasip1":
		t.Skip("package net calls no Control here")
	}
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		d := startLoad(4, "tcp", g.Addr().String())
		bad := errors.New("no buffer space")
		tries := 0
		for at := range 3 {
			for range count(20, 3) {
				calls := 0
				lc := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
					if calls++; calls > at {
						return bad
					}
					return nil
				}}
				for _, address := range []string{g.Addr().String(), "127.0.0.1:0"} {
					if m.name == "dispatcher" && (at > 0 || address == g.Addr().String()) {
						continue // it opens one socket
					}
					calls = 0
					left := ls[0].Info().Sockets - 2 // by those that failed before, to be adopted
					if m.name == "dispatcher" {
						left = 0
					}
					h, err := ListenGroup(context.Background(), "tcp", address, left+3, m.opt, WithListenConfig(lc))
					require.Nil(t, h)
					require.IsType(t, (*net.OpError)(nil), err)
					require.ErrorIs(t, err, bad)
					require.ErrorContains(t, err, " 127.0.0.1:")
					require.Equal(t, 2, ls[0].Info().Members)
					tries++
				}
			}
		}
		require.Eventually(t, func() bool { return d.served.Load() > 20 }, limit(10*time.Second), time.Millisecond)
		d.end(t, true)
		require.NoError(t, g.Close())
		wg.Wait()
		t.Logf("%d listens failed beside it", tries)
	})
}

// Many goroutines that listen on one address at once end up in one group; when
// all have closed, the address is free again.
func TestListenFromManyGoroutines(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, _ := newTestGroup(t, 1, "tcp", "127.0.0.1:0", m.opt)
		addr := g.Addr().String()
		require.NoError(t, g.Close())
		for range count(20, 3) {
			var wg sync.WaitGroup
			for range 16 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for range 5 {
						l, err := Listen("tcp", addr, m.opt)
						if err != nil {
							t.Error(err)
							return
						}
						if err := l.Close(); err != nil {
							t.Error(err)
						}
					}
				}()
			}
			wg.Wait()
			ln, err := net.Listen("tcp", addr)
			require.NoError(t, err)
			require.NoError(t, ln.Close())
		}
	})
}

// A context that is done opens nothing; afterwards it doesn't matter.
func TestContextIsForOpening(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		ctx, cancel := context.WithCancel(context.Background())
		g, err := ListenGroup(ctx, "tcp", "127.0.0.1:0", 2, m.opt)
		require.NoError(t, err)
		cancel()
		dialTest(t, g.Addr())
		ls := g.Listeners()
		ls[1].Close()
		acceptWithin(t, ls[0])
		require.NoError(t, g.Close())
		ln, err := ListenContext(ctx, "tcp", "localhost:0", m.opt)
		if err == nil { // a hosts file may be quicker than the context
			require.NoError(t, ln.Close())
		} else {
			require.ErrorContains(t, err, "cancel")
		}
	})
}

// A context that ends just when the group's first socket is open closes it.
func TestContextEndsWhileOpening(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for range 40 {
			ctx, cancel := context.WithCancel(context.Background())
			calls := 0
			lc := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
				if calls++; calls == 2 {
					cancel()
				}
				return nil
			}}
			g, err := ListenGroup(ctx, "tcp", "127.0.0.1:0", 2, m.opt, WithListenConfig(lc))
			if err == nil {
				require.NoError(t, g.Close())
			}
			lc.Control = func(string, string, syscall.RawConn) error { cancel(); return nil }
			ln, err := ListenContext(ctx, "tcp", "127.0.0.1:0", m.opt, WithListenConfig(lc))
			if err == nil {
				require.NoError(t, ln.Close())
			}
			cancel()
		}
	})
}
