package lblisten

// How Info and what is in it are written, and read again.

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"
)

type named interface {
	fmt.Stringer
	encoding.TextMarshaler
}

// Every value that has a name is written as it, and read again; no other is.
func TestNamesAreReadAgain(t *testing.T) {
	var known []named
	for b := BalancerNone; b <= BalancerDispatcher; b++ {
		known = append(known, b)
	}
	for s := SteerFlow; s <= SteerLoad; s++ {
		known = append(known, s)
	}
	for i := Inheritance(0); i <= InheritProcess|InheritKernel|InheritHandoff|InheritSystemd; i++ {
		known = append(known, i)
	}
	for _, v := range known {
		b, err := v.MarshalText()
		require.NoError(t, err)
		require.Equal(t, v.String(), string(b))
		j, err := json.Marshal(v)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("%q", v), string(j))
		var again any
		switch v.(type) {
		case Balancer:
			var x Balancer
			require.NoError(t, json.Unmarshal(j, &x))
			again = x
		case Steering:
			var x Steering
			require.NoError(t, json.Unmarshal(j, &x))
			again = x
		case Inheritance:
			var x Inheritance
			require.NoError(t, json.Unmarshal(j, &x))
			again = x
		}
		require.Equal(t, any(v), again)
	}
	for _, v := range []named{Balancer(-1), BalancerDispatcher + 1, Steering(-1), SteerLoad + 1, Inheritance(-1), Inheritance(1 << 10)} {
		_, err := v.MarshalText()
		require.ErrorContains(t, err, v.String())
	}
	for _, bad := range []string{"", "flow ", "process+", "process,kernel", "SO_REUSE", "None"} {
		require.Error(t, new(Balancer).UnmarshalText([]byte(bad)), "%q", bad)
		require.Error(t, new(Steering).UnmarshalText([]byte(bad)), "%q", bad)
		require.Error(t, new(Inheritance).UnmarshalText([]byte(bad)), "%q", bad)
	}
	var b Balancer
	for _, elsewhere := range []string{"SO_REUSEPORT", "SO_REUSEPORT_LB"} { // another system wrote it
		require.NoError(t, b.UnmarshalText([]byte(elsewhere)))
		require.Equal(t, BalancerKernel, b)
	}
}

// Info is a line, a group of attributes in a log, and readable in JSON.
func TestFormsOfInfo(t *testing.T) {
	i := Info{Balancer: BalancerDispatcher, Steering: SteerSource, OnClose: InheritProcess | InheritHandoff, Members: 3, Sockets: 1,
		Reason: errors.New("nobody is there")}
	require.Equal(t, "dispatcher by source, members 3, sockets 1, on close process+handoff, on kill none: nobody is there", i.String())
	for _, i := range []Info{i, {}, {Balancer: BalancerKernel, OnKill: InheritKernel, Members: 1, Sockets: 2}} {
		b, err := json.Marshal(i)
		require.NoError(t, err)
		var again Info
		require.NoError(t, json.Unmarshal(b, &again))
		require.Equal(t, i, again)
	}
	require.Error(t, json.Unmarshal([]byte(`{"steering":"wind"}`), new(Info)))

	var out bytes.Buffer
	slog.New(slog.NewTextHandler(&out, nil)).Info("up", "listener", i)
	require.Contains(t, out.String(), `listener.balancer=dispatcher listener.steering=source listener.on_close=process+handoff listener.on_kill=none listener.members=3 listener.sockets=1 listener.reason="nobody is there"`)
	out.Reset()
	slog.New(slog.NewJSONHandler(&out, nil)).Info("up", "listener", i, "kill", i.OnKill)
	require.Contains(t, out.String(), `"listener":{"balancer":"dispatcher","steering":"source","on_close":"process+handoff"`)
	require.Contains(t, out.String(), `"kill":"none"`)
}

// A member that is alone claims nothing, and Reason begins with what helps.
func TestLoneMemberClaimsNothing(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		require.Equal(t, InheritProcess, g.Info().OnClose)
		require.NoError(t, ls[0].Close())
		i := g.Info()
		require.Zero(t, i.OnClose)
		require.Zero(t, i.OnKill)
		if handsOff() {
			require.Regexp(t, "^nobody would take over from this process if it were killed: use WithHandoff", i.Reason.Error())
		}
	})
}
