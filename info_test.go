package lblisten

// What is in force, in words and numbers.

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// Names are the field's.
func TestNames(t *testing.T) {
	require.Equal(t, "none", BalancerNone.String())
	require.Equal(t, "dispatcher", BalancerDispatcher.String())
	require.Equal(t, "flow source cpu load", fmt.Sprint(SteerFlow, SteerSource, SteerCPU, SteerLoad))
	require.Equal(t, "none", Inheritance(0).String())
	require.Equal(t, "process", InheritProcess.String())
	require.Equal(t, "process+kernel", (InheritProcess | InheritKernel).String())
	require.Equal(t, "process+kernel+handoff", (InheritProcess | InheritKernel | InheritHandoff).String())
	require.Equal(t, "process+systemd", (InheritProcess | InheritSystemd).String())
	require.Contains(t, Inheritance(64).String(), "64")
	require.Contains(t, Balancer(7).String(), "7")
	require.Contains(t, Steering(7).String(), "7")
}

// Info says what is in force, and why nothing stronger is.
func TestInfo(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
		i := g.Info()
		require.Equal(t, i, ls[0].Info())
		require.Equal(t, 3, i.Members)
		require.Equal(t, SteerFlow, i.Steering)
		require.NotZero(t, i.OnClose&InheritProcess)
		require.Zero(t, i.OnKill&InheritProcess, "a process that is killed can't inherit")
		if m.name == "kernel" {
			require.Equal(t, BalancerKernel, i.Balancer)
			require.Contains(t, []string{"SO_REUSEPORT", "SO_REUSEPORT_LB"}, i.Balancer.String())
		} else {
			require.Equal(t, BalancerDispatcher, i.Balancer)
			require.Equal(t, 1, i.Sockets)
		}
		if i.OnKill == 0 {
			require.Error(t, i.Reason)
		}
		require.NoError(t, ls[0].Close())
		require.NoError(t, ls[1].Close())
		require.Zero(t, ls[2].Info().OnClose&InheritProcess, "nobody is left to inherit")
		require.NoError(t, ls[2].Close())
		require.Zero(t, g.Info().Members)
	})
}

// Stats tell how many connections are queued, and how many may be, where the system does.
func TestStats(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		opts := []Option{m.opt}
		if setsBacklog() {
			opts = append(opts, WithBacklog(50))
		}
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", opts...)
		queueUp(t, g.Addr(), 7)
		s := g.Stats()
		if !tellsQueues() {
			require.Equal(t, []int{-1, -1}, []int{s.Queued, s.Backlog})
			t.Skip("the system doesn't tell how many connections are queued")
		}
		require.Equal(t, 7, s.Queued)
		sockets := g.Info().Sockets
		require.Equal(t, 50*sockets, s.Backlog)
		require.Equal(t, 50, ls[0].Stats().Backlog)
		require.NoError(t, ls[1].Close())
		require.Equal(t, 7, g.Stats().Queued, "what is queued is still there")
		for range 7 {
			acceptWithin(t, ls[0])
		}
		s = g.Stats()
		require.EqualValues(t, 7, s.Accepted)
		require.Zero(t, s.Queued)
	})
}

// What is inherited is counted an instant before it is accepted, and never more.
func TestStatsInTheMiddleOfAccept(t *testing.T) {
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithLB())
	countInherited(ls[0])
	require.Zero(t, ls[0].Stats().Inherited)
	require.Zero(t, g.Stats().Inherited)
	countAccepted(ls[0])
	require.EqualValues(t, 1, ls[0].Stats().Inherited)
	require.EqualValues(t, 1, g.Stats().Inherited)
}
