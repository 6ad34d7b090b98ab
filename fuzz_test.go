package lblisten

// Any sequence of operations on a group, with an oracle.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// An oracle runs operations on one group and knows what each may lead to. What a
// kernel's balancer does with a connection it can't know: there one must be
// returned at once only if all members wait.
type oracle struct {
	t         testing.TB
	who       string // balances: "kernel", "dispatcher", or "memory" for Dispatch
	opts      []Option
	addr      net.Addr
	listener  *conns // of Dispatch
	members   []*judged
	groups    []*Group
	sent      []*sent
	results   chan judgement
	waiting   int // Accepts in progress
	hasClosed bool
}

// A judged is a member as the oracle sees it.
type judged struct {
	*Listener
	closed, past bool
	waiting      int // Accepts in progress
	returned     uint64
}

// A sent is a connection of a client.
type sent struct {
	client   net.Conn // nil in memory
	token    *token
	port     int
	reset    bool // by the client: it need not come out
	returned bool
}

type judgement struct {
	m *judged
	c net.Conn
	e error
}

const oracleMost = 8 // members, and Accepts of a member

func (o *oracle) open(n int) {
	switch o.who {
	case "memory":
		o.listener = newConns()
		o.listener.conns = make(chan net.Conn, math.MaxUint8)
		g, err := Dispatch(o.listener, n, o.opts...)
		require.NoError(o.t, err)
		o.joined(g)
	default:
		g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", n, o.opts...)
		if errors.Is(err, ErrUnsupported) { // this steering
			o.opts = o.opts[:1]
			g, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", n, o.opts...)
		}
		require.NoError(o.t, err)
		o.joined(g)
	}
}

func (o *oracle) joined(g *Group) {
	o.addr = g.Addr()
	o.groups = append(o.groups, g)
	for _, l := range g.Listeners() {
		o.members = append(o.members, &judged{Listener: l})
	}
}

// living are the members that aren't closed.
func (o *oracle) living() (ms []*judged) {
	for _, m := range o.members {
		if !m.closed {
			ms = append(ms, m)
		}
	}
	return ms
}

// due is how many connections must still come out of an Accept.
func (o *oracle) due() (n int) {
	for _, s := range o.sent {
		if !s.returned && !s.reset {
			n++
		}
	}
	return n
}

// resets is how many may come out, although their clients are gone.
func (o *oracle) resets() (n int) {
	for _, s := range o.sent {
		if !s.returned && s.reset {
			n++
		}
	}
	return n
}

// judge takes the result of an Accept.
func (o *oracle) judge(j judgement) {
	j.m.waiting--
	o.waiting--
	if j.e != nil {
		require.Nil(o.t, j.c)
		var op *net.OpError
		require.ErrorAs(o.t, j.e, &op)
		require.Equal(o.t, "accept", op.Op)
		require.Equal(o.t, j.m.Addr(), op.Addr)
		switch {
		case errors.Is(j.e, net.ErrClosed):
			require.True(o.t, j.m.closed, "the listener isn't closed")
		case errors.Is(j.e, os.ErrDeadlineExceeded):
			require.True(o.t, j.m.past, "there is no deadline")
		default:
			require.NoError(o.t, j.e)
		}
		return
	}
	j.m.returned++
	for _, s := range o.sent {
		is := s.client == nil && j.c == net.Conn(s.token)
		if s.client != nil {
			is = !s.returned && j.c.RemoteAddr().(*net.TCPAddr).Port == s.port
		}
		if is {
			require.False(o.t, s.returned, "a connection is returned twice")
			s.returned = true
			if s.client != nil {
				require.NoError(o.t, j.c.Close())
				s.client.Close()
			} else {
				require.False(o.t, s.token.closed.Load())
			}
			return
		}
	}
	require.Fail(o.t, "nobody dialled", "%v", j.c.RemoteAddr())
}

// next waits for the result of an Accept.
func (o *oracle) next() {
	select {
	case j := <-o.results:
		o.judge(j)
	case <-time.After(limit(20 * time.Second)):
		buf := make([]byte, 1<<20)
		require.Fail(o.t, "an Accept hangs", "%d wait, %d connections are due\n%s", o.waiting, o.due(), buf[:runtime.Stack(buf, true)])
	}
}

// settle waits for what must happen, and takes what may have.
func (o *oracle) settle() {
	for o.due() > 0 && o.mustTake() {
		o.next()
	}
	for {
		select {
		case j := <-o.results:
			o.judge(j)
			continue
		default:
		}
		break
	}
	inherited := uint64(0)
	for _, m := range o.members {
		s := m.Stats()
		require.GreaterOrEqual(o.t, s.Accepted, m.returned) // one may be on its way
		inherited += s.Inherited
	}
	if !o.hasClosed {
		require.Zero(o.t, inherited, "nobody has left anything")
	}
}

// mustTake tells whether one of the Accepts has to return a connection, if there
// is one.
func (o *oracle) mustTake() bool {
	all, some := true, false
	for _, m := range o.living() {
		all = all && m.waiting > 0
		some = some || m.waiting > 0
	}
	return some && (all || o.who != "kernel")
}

// resolve waits for the Accepts of members that have to end.
func (o *oracle) resolve(ms ...*judged) {
	for _, m := range ms {
		for m.waiting > 0 {
			o.next()
		}
	}
}

func (o *oracle) accept(m *judged) {
	m.waiting++
	o.waiting++
	go func() {
		c, err := m.Accept()
		o.results <- judgement{m, c, err}
	}()
	if m.closed || m.past {
		returned := m.returned
		o.resolve(m)
		require.Equal(o.t, returned, m.returned, "it takes no connection")
	}
}

func (o *oracle) dial() {
	if len(o.sent) == math.MaxUint8 {
		return
	}
	s := &sent{}
	o.sent = append(o.sent, s)
	if o.who == "memory" {
		s.token = &token{number: len(o.sent), from: flow(fmt.Sprintf("192.0.2.%d", len(o.sent)%7), len(o.sent))}
		o.listener.conns <- s.token
		return
	}
	c, err := dialOnce("tcp", o.addr.String())
	require.NoError(o.t, err)
	s.client, s.port = c, c.LocalAddr().(*net.TCPAddr).Port
}

// close closes members by end, and judges what it returns.
func (o *oracle) close(ms []*judged, end func() error) {
	some := false
	for _, m := range ms {
		some = some || !m.closed
		m.closed, o.hasClosed = true, true
	}
	if err := end(); some {
		require.NoError(o.t, err)
	} else {
		var op *net.OpError
		require.ErrorAs(o.t, err, &op)
		require.ErrorIs(o.t, err, net.ErrClosed)
	}
	o.resolve(ms...)
	if len(o.living()) == 0 {
		o.ended()
	}
}

// ended checks that nothing is left when no member is.
func (o *oracle) ended() {
	require.Zero(o.t, o.waiting)
	for _, m := range o.members {
		require.Equal(o.t, m.returned, m.Stats().Accepted)
		require.Equal(o.t, Info{Reason: net.ErrClosed}, m.Info())
		require.ErrorIs(o.t, m.SetDeadline(time.Time{}), net.ErrClosed)
	}
	require.Zero(o.t, openAddresses())
	if o.who == "memory" {
		for range len(o.listener.conns) {
			s := (<-o.listener.conns).(*token)
			require.False(o.t, s.closed.Load())
			s.Close() // nobody has taken it
		}
		select {
		case <-o.listener.done:
		default:
			require.Fail(o.t, "the listener is not closed")
		}
	} else {
		_, err := dialOnce("tcp", o.addr.String())
		require.True(o.t, isRefused(err), "%v", err)
	}
	for _, s := range o.sent {
		switch {
		case s.returned || s.reset:
		case s.client == nil:
			require.True(o.t, s.token.closed.Load())
		default: // it waited for nobody
			s.client.SetDeadline(time.Now().Add(limit(10 * time.Second)))
			_, err := s.client.Read(make([]byte, 1))
			require.Error(o.t, err)
			require.NotErrorIs(o.t, err, os.ErrDeadlineExceeded)
			s.client.Close()
		}
	}
	o.members, o.groups, o.sent, o.hasClosed = nil, nil, nil, false
}

// do does what a byte says: its high half chooses who, its low half what.
func (o *oracle) do(b byte) {
	if len(o.members) == 0 {
		o.open(1 + int(b>>4)%3)
		return
	}
	m := o.members[int(b>>4)%len(o.members)]
	switch b & 15 {
	case 0, 1, 2:
		o.dial()
	case 3, 4, 5:
		if m.waiting < oracleMost {
			o.accept(m)
		}
	case 6: // one more, and with the highest bit two
		if o.who != "memory" && len(o.members) < oracleMost {
			g, err := ListenGroup(context.Background(), "tcp", o.addr.String(), 1+int(b>>7), o.opts...)
			require.NoError(o.t, err)
			o.joined(g)
			require.Equal(o.t, len(o.living()), g.Info().Members)
		}
	case 7, 8:
		o.close([]*judged{m}, m.Close)
	case 9:
		for i, g := range o.groups {
			if i == int(b>>4)%len(o.groups) {
				var ms []*judged
				for _, m := range o.members {
					for _, l := range g.Listeners() {
						if m.Listener == l {
							ms = append(ms, m)
						}
					}
				}
				o.close(ms, g.Close)
				break
			}
		}
	case 10, 11, 12:
		if m.closed {
			require.ErrorIs(o.t, m.SetDeadline(longPast), net.ErrClosed)
			break
		}
		m.past = b&15 != 12
		switch b & 15 {
		case 10:
			require.NoError(o.t, m.SetDeadline(longPast))
		case 11:
			soon := time.Now().Add(200 * time.Microsecond)
			require.NoError(o.t, m.SetDeadline(soon))
			o.resolve(m)
			time.Sleep(time.Until(soon))
		default:
			require.NoError(o.t, m.SetDeadline([]time.Time{{}, time.Now().Add(time.Hour)}[b>>4&1]))
		}
		if m.past {
			o.resolve(m)
		}
	case 13:
		if n := len(o.sent); n > 0 {
			if s := o.sent[int(b>>4)%n]; s.client != nil && !s.returned {
				s.client.Close()
				s.reset = true
			}
		}
	case 14:
		i := o.groups[0].Info()
		require.Equal(o.t, len(o.living()), i.Members)
		if n, resets := o.due(), o.resets(); o.who != "memory" && o.waiting == 0 && i.Steering != SteerSource && runtime.GOOS == "linux" && tellsQueues() {
			q := o.groups[0].Stats().Queued
			require.GreaterOrEqual(o.t, q, n)
			require.LessOrEqual(o.t, q, n+resets)
		}
	default: // whoever lives accepts, until nothing waits
		o.drain()
	}
}

// drain has every connection come out.
func (o *oracle) drain() {
	for o.due() > 0 && len(o.living()) > 0 {
		for _, m := range o.living() {
			if m.past {
				require.NoError(o.t, m.SetDeadline(time.Time{}))
				m.past = false
			}
			if m.waiting == 0 {
				o.accept(m)
			}
		}
		o.next()
	}
}

// FuzzOperations does any sequence of operations on a group, and knows what each
// may lead to: a connection comes out of exactly one Accept while a member lives;
// Accept after Close, and after the deadline also if a connection waits, fails as
// net's does; the counters add up; after the last Close nothing is left.
func FuzzOperations(f *testing.F) {
	const dial, accept, join, end, endGroup, past, soon, clear, reset, look, drain = 0, 3, 6, 7, 9, 10, 11, 12, 13, 14, 15
	second := func(b byte) byte { return 1<<4 | b }
	third := func(b byte) byte { return 2<<4 | b }
	for who := range byte(3) {
		for steering := range byte(4) {
			first := who | steering<<2
			for i, ops := range [][]byte{
				{dial, accept, end, end},
				{dial, dial, dial, end, second(accept), second(accept), drain},
				{accept, second(accept), third(accept), dial, dial, dial, dial, drain, end, second(end), third(end)},
				{past, dial, accept, clear, accept, soon, accept, clear, drain},
				{accept, accept, accept, past, dial, clear, second(accept), drain, endGroup},
				{accept, end, second(accept), dial, reset, dial, drain, third(end), second(end), dial},
				{join, accept, third(accept), dial, dial, end, second(end), 3<<4 | accept, drain, look, endGroup},
				{dial, dial, join, end, join, second(end), join, third(end), look, dial, drain},
				{accept, look, past, second(past), dial, dial, third(accept), third(accept), third(accept), clear, drain},
				{dial, dial, dial, endGroup, dial, accept, dial, endGroup, endGroup},
			} {
				if hurry > 1 && (i+int(who+steering))%3 != 0 {
					continue // each with one of three
				}
				f.Add(append([]byte{first, 2 << 4}, ops...))
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 || len(b) > 200 {
			return
		}
		noLeaks(t)
		o := &oracle{t: t, who: []string{"kernel", "dispatcher", "memory"}[b[0]%4%3], results: make(chan judgement, math.MaxUint8)}
		steering := Steering(b[0] >> 2 & 3)
		switch o.who {
		case "kernel":
			modes[0].need(t)
			o.opts = []Option{modes[0].opt, WithSteering(steering)}
		case "dispatcher":
			o.opts = []Option{modes[1].opt, WithSteering(steering)}
		case "memory":
			if steering != SteerCPU {
				o.opts = []Option{WithSteering(steering)}
			}
		}
		for _, b := range b[1:] {
			o.do(b)
			o.settle()
		}
		if len(o.members) == 0 {
			return
		}
		o.drain()
		for len(o.members) > 0 {
			m := o.living()[0]
			o.close([]*judged{m}, m.Close)
		}
	})
}
