package lblisten

// What is refused, with which words.

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

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
