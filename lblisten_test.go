package lblisten

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
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
		if c, err := ln.(syscall.Conn).SyscallConn(); runtime.GOOS == "linux" {
			require.NoError(t, err)
			_, backlog := queuesOf([]syscall.RawConn{c})
			require.Equal(t, 3, backlog)
		}
		require.NoError(t, ln.Close())
	}
}

// socketPath is short enough for a unix socket on every system.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// hasUnixSockets is false on old versions of Windows, and under wine.
func hasUnixSockets(t testing.TB) bool {
	ln, err := net.Listen("unix", socketPath(t))
	if err != nil {
		t.Logf("without unix sockets: %v", err)
		return false
	}
	return ln.Close() == nil
}

// One address is one group, however it is spelled.
func TestOneAddressIsOneGroup(t *testing.T) {
	_, _, err := resolve(context.Background(), "tcp", "localhost:0")
	if err != nil {
		t.Skipf("localhost has no address here: %v", err)
	}
	inModes(t, func(t *testing.T, m mode) {
		for _, spelled := range [][]string{
			{"tcp 127.0.0.1:0", "tcp localhost:PORT", "tcp4 localhost:PORT", "tcp4 127.0.0.1:PORT", "tcp [::ffff:127.0.0.1]:PORT"},
			{"tcp :0", "tcp 0.0.0.0:PORT", "tcp [::]:PORT", "tcp :PORT"},
			{"tcp4 0.0.0.0:0", "tcp4 :PORT"},
			{"tcp6 [::1]:0", "tcp [::1]:PORT", "tcp6 [0:0::1]:PORT"},
		} {
			network, address, _ := strings.Cut(spelled[0], " ")
			if network == "tcp6" {
				endpoints[1].need(t)
			}
			if network == "tcp" && address == ":0" && (runtime.GOOS == "dragonfly" || runtime.GOOS == "openbsd") {
				continue // there it is what net makes of it
			}
			first, err := Listen(network, address, m.opt)
			require.NoError(t, err)
			port := strconv.Itoa(first.Addr().(*net.TCPAddr).Port)
			for _, s := range spelled[1:] {
				network, address, _ := strings.Cut(strings.ReplaceAll(s, "PORT", port), " ")
				l, err := Listen(network, address, m.opt)
				require.NoError(t, err, s)
				require.Equal(t, 2, l.(*Listener).Info().Members, s)
				require.NoError(t, l.Close())
			}
			require.NoError(t, first.Close())
		}
	})
}

// Port 0 opens a new group each time, and the members of one share its port.
func TestPortZeroIsANewGroup(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range endpoints[:3] {
			e.need(t)
			a, as := newTestGroup(t, 3, e.network, e.listen, m.opt)
			b, _ := newTestGroup(t, 3, e.network, e.listen, m.opt)
			require.NotEqual(t, a.Addr().String(), b.Addr().String())
			for _, l := range as {
				require.Equal(t, a.Addr(), l.Addr())
				require.NotZero(t, l.Addr().(*net.TCPAddr).Port)
			}
			a.Close()
			b.Close()
		}
	})
}

// A balanced and a plain listener conflict on one address, whichever comes
// first, and the error says what to do.
func TestConflicts(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		plain, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		ln, err := Listen("tcp", plain.Addr().String(), m.opt)
		require.True(t, ln == nil)
		requireInUse(t, err)
		require.ErrorContains(t, err, "choose another address")
		g, err := ListenGroup(context.Background(), "tcp", plain.Addr().String(), 3, m.opt)
		require.Nil(t, g)
		requireInUse(t, err)
		require.NoError(t, plain.Close())

		ln, err = Listen("tcp", "127.0.0.1:0", m.opt)
		require.NoError(t, err)
		_, err = net.Listen("tcp", ln.Addr().String())
		requireInUse(t, err)
		_, err = Listen("tcp", ln.Addr().String())
		requireInUse(t, err)
		require.NoError(t, ln.Close())
		plain, err = Listen("tcp", ln.Addr().String())
		require.NoError(t, err)
		require.NoError(t, plain.Close())
	})
}

func requireInUse(t *testing.T, err error) {
	t.Helper()
	require.IsType(t, (*net.OpError)(nil), err)
	require.True(t, isAddrInUse(err), "%v", err)
}

// A member that doesn't fit its group is refused, with an error that names both.
func TestMemberMustFitItsGroup(t *testing.T) {
	noLeaks(t)
	d, err := Listen("tcp", "127.0.0.1:0", WithDispatcher(), WithSteering(SteerLoad))
	require.NoError(t, err)
	for _, c := range []struct {
		opts []Option
		want []string
	}{
		{[]Option{WithRequireKernel(), WithSteering(SteerLoad)}, []string{"WithRequireKernel", "dispatcher"}},
		{[]Option{WithDispatcher()}, []string{"flow", "load"}},
		{[]Option{WithLB(), WithSteering(SteerSource)}, []string{"source", "load"}},
	} {
		_, err := Listen("tcp", d.Addr().String(), c.opts...)
		require.IsType(t, (*net.OpError)(nil), err)
		for _, want := range append(c.want, d.Addr().String()) {
			require.ErrorContains(t, err, want)
		}
	}
	l, err := Listen("tcp", d.Addr().String(), WithLB(), WithSteering(SteerLoad))
	require.NoError(t, err, "WithLB joins a dispatcher's group")
	require.Equal(t, BalancerDispatcher, l.(*Listener).Info().Balancer)
	require.NoError(t, l.Close())
	require.NoError(t, d.Close())

	modes[0].need(t)
	k, err := Listen("tcp", "127.0.0.1:0", WithLB())
	require.NoError(t, err)
	_, err = Listen("tcp", k.Addr().String(), WithDispatcher())
	require.ErrorContains(t, err, "WithDispatcher")
	require.ErrorContains(t, err, BalancerKernel.String())
	require.NoError(t, k.Close())
}

// Bad input gets an error that names it, and harms nothing.
func TestBadInput(t *testing.T) {
	noLeaks(t)
	for _, c := range []struct {
		network, address string
		opts             []Option
		want             []string
	}{
		{"tcp", "127.0.0.1:99999", nil, []string{"99999"}},
		{"tcp", "127.0.0.1", nil, []string{"missing port", "127.0.0.1"}},
		{"tcp", "127.0.0.1:http-nonsense", nil, []string{"http-nonsense"}},
		{"tcp", "256.1.1.1.1:0", nil, []string{"256.1.1.1.1"}},
		{"udp", "127.0.0.1:0", nil, []string{"udp"}},
		{"", "127.0.0.1:0", nil, []string{"unknown network"}},
		{"tcp4", "[::1]:0", nil, []string{"::1"}},
		{"tcp6", "127.0.0.1:0", nil, []string{"127.0.0.1"}},
		{"unix", filepath.Join(os.TempDir(), strings.Repeat("x", 200)), nil, []string{"invalid argument"}},
		{"tcp", "127.0.0.1:0", []Option{WithBacklog(0)}, []string{"WithBacklog(0)", "127.0.0.1:0"}},
		{"tcp", "127.0.0.1:0", []Option{WithBacklog(-1)}, []string{"WithBacklog(-1)"}},
		{"tcp", "127.0.0.1:0", []Option{WithReusePort()}, []string{"WithReusePort", "WithLB"}},
		{"tcp", "127.0.0.1:0", []Option{WithDispatcher(), WithRequireKernel()}, []string{"WithDispatcher", "WithRequireKernel"}},
		{"tcp", "127.0.0.1:0", []Option{WithSteering(Steering(9))}, []string{"9"}},
		{"tcp", "127.0.0.1:0", []Option{{}}, []string{"Option"}},
	} {
		ln, err := Listen(c.network, c.address, append([]Option{WithLB()}, c.opts...)...)
		require.True(t, ln == nil, "%v", c)
		require.IsType(t, (*net.OpError)(nil), err, "%v", c)
		for _, want := range c.want {
			if runtime.GOOS != "windows" || want != "invalid argument" {
				require.ErrorContains(t, err, want)
			}
		}
	}
	for _, n := range []int{-1, 0, 32769, 1_000_000} {
		for _, opt := range []Option{WithLB(), WithDispatcher()} {
			g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", n, opt)
			require.Nil(t, g)
			require.ErrorContains(t, err, strconv.Itoa(n))
			require.ErrorContains(t, err, "127.0.0.1:0")
			require.Equal(t, n > 0, errors.Is(err, ErrGroupFull))
		}
	}
}

// What package net refuses, we refuse with the same words.
func TestAddressErrorsAreNets(t *testing.T) {
	noLeaks(t)
	for _, c := range [][2]string{{"tcp", "127.0.0.1:99999"}, {"tcp", "x"}, {"tcp", "[::1:0"}, {"udp", "127.0.0.1:0"}, {"nonsense", "x"}, {"tcp4", "[::1]:0"}, {"tcp", "192.0.2.77:0"}} {
		_, want := net.Listen(c[0], c[1])
		require.Error(t, want)
		_, err := Listen(c[0], c[1], WithDispatcher())
		require.ErrorContains(t, err, want.Error())
	}
}

// What cannot be had is ErrUnsupported.
func TestUnsupported(t *testing.T) {
	noLeaks(t)
	path := socketPath(t)
	for _, c := range []struct {
		network, address string
		opts             []Option
	}{
		{"unix", path, []Option{WithRequireKernel()}},
		{"unix", path, []Option{WithSteering(SteerSource)}},
		{"tcp", "127.0.0.1:0", []Option{WithDispatcher(), WithSteering(SteerCPU)}},
	} {
		if c.network == "unix" && !hasUnixSockets(t) {
			continue
		}
		_, err := Listen(c.network, c.address, c.opts...)
		require.ErrorIs(t, err, ErrUnsupported)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}
	if !setsReusePort() {
		_, err := Listen("tcp", "127.0.0.1:0", WithReusePort())
		require.ErrorIs(t, err, ErrUnsupported)
	}
	require.NotErrorIs(t, ErrGroupFull, ErrUnsupported)
}

// A member past the kernel's limit is refused; it would get nothing.
func TestGroupFull(t *testing.T) {
	modes[0].need(t)
	if mostSockets() > 1000 {
		t.Skipf("the limit of a group is %d sockets here; listen fails past it", mostSockets())
	}
	noLeaks(t)
	g, ls := newTestGroup(t, mostSockets(), "tcp", "127.0.0.1:0", WithRequireKernel())
	_, err := Listen("tcp", g.Addr().String(), WithLB())
	require.ErrorIs(t, err, ErrGroupFull)
	require.NoError(t, ls[0].Close())
	l, err := Listen("tcp", g.Addr().String(), WithLB())
	require.NoError(t, err, "a member left its socket")
	require.NoError(t, l.Close())
	require.NoError(t, g.Close())
	_, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", mostSockets()+1)
	require.ErrorIs(t, err, ErrGroupFull)
}

// Plain SO_REUSEPORT can be used beside load balancing.
func TestReusePortBesideLB(t *testing.T) {
	if !setsReusePort() {
		t.Skipf("no SO_REUSEPORT on %s", runtime.GOOS)
	}
	noLeaks(t)
	a, err := Listen("tcp", "127.0.0.1:0", WithReusePort())
	require.NoError(t, err)
	require.IsType(t, (*net.TCPListener)(nil), a)
	b, err := Listen("tcp", a.Addr().String(), WithReusePort())
	require.NoError(t, err)
	_, err = Listen("tcp", a.Addr().String())
	requireInUse(t, err)
	lb, err := Listen("tcp", "127.0.0.1:0", WithLB())
	require.NoError(t, err)
	for _, l := range []net.Listener{a, b, lb} {
		require.NoError(t, l.Close())
	}
}

// The user's ListenConfig is in force: its Control runs before bind, its error
// is the caller's, and the keep-alive of accepted connections is as it says.
func TestListenConfig(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		calls := 0
		bad := errors.New("no")
		lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
			calls++
			if network == "tcp6" {
				return bad
			}
			return nil
		}}
		_, _ = newTestGroup(t, 3, "tcp4", "127.0.0.1:0", m.opt, WithListenConfig(lc))
		if runtime.GOOS != "plan9" && runtime.GOOS != "js" && runtime.GOOS != "wasip1" {
			require.Equal(t, map[string]int{"kernel": 3, "dispatcher": 1}[m.name], calls)
		}
		endpoints[1].need(t)
		_, err := Listen("tcp6", "[::1]:0", m.opt, WithListenConfig(lc))
		require.ErrorIs(t, err, bad)
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

// Unix sockets are balanced by the dispatcher, and the file goes with the last
// member.
func TestUnixSocket(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			noLeaks(t)
			path := socketPath(t)
			if runtime.GOOS == "windows" {
				t.Skip("not tried on Windows: wine has no unix sockets")
			}
			plain, err := net.Listen(network, path)
			if err != nil {
				t.Skipf("no %s here: %v", network, err)
			}
			require.NoError(t, plain.Close())
			a, err := Listen(network, path, WithLB())
			require.NoError(t, err)
			b, err := Listen(network, path, WithLB())
			require.NoError(t, err)
			i := a.(*Listener).Info()
			require.Equal(t, BalancerDispatcher, i.Balancer)
			require.Error(t, i.Reason)
			require.Equal(t, 2, i.Members)
			require.Equal(t, 1, i.Sockets)
			_, err = a.(*Listener).AcceptTCP()
			require.ErrorIs(t, err, ErrUnsupported)

			var clients []net.Conn
			for range 20 {
				clients = append(clients, dialTest(t, a.Addr()))
			}
			var got [2]int
			for range clients {
				for i, l := range []net.Listener{a, b} {
					if c, err := acceptBy(l, 5*time.Millisecond); err == nil {
						require.IsType(t, (*net.UnixConn)(nil), c)
						got[i]++
						c.Close()
					}
				}
			}
			require.Equal(t, 20, got[0]+got[1])
			require.NoError(t, a.Close())
			dialTest(t, b.Addr())
			acceptWithin(t, b)
			_, err = os.Stat(path)
			require.NoError(t, err)
			require.NoError(t, b.Close())
			_, err = os.Stat(path)
			require.ErrorIs(t, err, os.ErrNotExist)

			// A file that nobody listens on: the error says so.
			require.NoError(t, os.WriteFile(path, nil, 0o600))
			_, err = Listen(network, path, WithLB())
			require.ErrorContains(t, err, "remove the file")
		})
	}
}

// The logger is told of fallbacks and of inheritance, in the group's words.
func TestLogger(t *testing.T) {
	noLeaks(t)
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, nil))
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithDispatcher(), WithLogger(log))
	require.Contains(t, b.String(), "dispatcher")
	require.NoError(t, ls[0].Close())
	require.NoError(t, g.Close())
	modes[0].need(t)
	b.Reset()
	g, ls = newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithLB(), WithLogger(log))
	require.NoError(t, ls[0].Close())
	require.Contains(t, b.String(), "inherit")
	later := joinTest(t, ls[1], WithLogger(log), WithLB())
	require.Contains(t, b.String(), "adopt")
	require.Contains(t, b.String(), g.Addr().String())
	require.NoError(t, later.Close())
	require.NoError(t, g.Close())
}

// Names are the field's.
func TestNames(t *testing.T) {
	require.Equal(t, "none", BalancerNone.String())
	require.Equal(t, "dispatcher", BalancerDispatcher.String())
	require.Equal(t, "flow source cpu load", fmt.Sprint(SteerFlow, SteerSource, SteerCPU, SteerLoad))
	require.Equal(t, "none", Inheritance(0).String())
	require.Equal(t, "process", InheritProcess.String())
	require.Equal(t, "process+kernel", (InheritProcess | InheritKernel).String())
	require.Equal(t, "process+kernel+handoff", (InheritProcess | InheritKernel | InheritHandoff).String())
	require.Contains(t, Inheritance(64).String(), "64")
	require.Contains(t, Balancer(7).String(), "7")
	require.Contains(t, Steering(7).String(), "7")
}
