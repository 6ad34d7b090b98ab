package lblisten

// What options do, and which fit together.

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

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
			require.Equal(t, 1+map[string]int{"kernel": 3, "dispatcher": 1}[m.name], calls, "once for the socket that finds out the place, and for each that is opened")
		}
		endpoints[1].need(t)
		_, err := Listen("tcp6", "[::1]:0", m.opt, WithListenConfig(lc))
		require.ErrorIs(t, err, bad)
	})
}

// The logger is told of fallbacks and of inheritance, in the group's words.
func TestLogger(t *testing.T) {
	noLeaks(t)
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithDispatcher(), WithLogger(log))
	require.Contains(t, b.String(), "dispatcher")
	require.NoError(t, ls[0].Close())
	require.NoError(t, g.Close())
	modes[0].need(t)
	b.Reset()
	g, ls = newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithLB(), WithLogger(log))
	require.NoError(t, ls[0].Close())
	require.Contains(t, b.String(), "level=INFO msg=\"lblisten: members left, siblings have their sockets\"")
	later := joinTest(t, ls[1], WithLogger(log), WithLB())
	require.Contains(t, b.String(), "level=DEBUG msg=\"lblisten: a new member adopted the socket of a closed one\"")
	require.Contains(t, b.String(), g.Addr().String())
	require.NoError(t, later.Close())
	require.NoError(t, g.Close())
}

// A logger may do what it likes, Listen included.
func TestLoggerMayListen(t *testing.T) {
	noLeaks(t)
	log := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		ln, err := Listen("tcp", "127.0.0.1:0", WithDispatcher())
		if err == nil {
			err = ln.Close()
		}
		return len(b), err
	}), nil))
	g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", WithDispatcher(), WithLogger(log))
	require.NoError(t, ls[0].Close())
	require.NoError(t, g.Close())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
