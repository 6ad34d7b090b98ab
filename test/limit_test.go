package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/netutil"
)

// A limited server holds each connection until its client has sent a second
// byte, and counts how many it has at a time.
type limited struct {
	open, most, served atomic.Int64
	conns              sync.WaitGroup
}

// serve accepts until the listener closes.
func (s *limited) serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		n := s.open.Add(1)
		for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
		}
		s.conns.Add(1)
		go func() {
			defer s.conns.Done()
			b := make([]byte, 2)
			if _, err := io.ReadFull(c, b[:1]); err == nil {
				c.Write(b[:1])
				if _, err = io.ReadFull(c, b[1:]); err == nil {
					s.served.Add(1)
					c.Write(b[1:])
				}
			}
			s.open.Add(-1) // before another can come
			c.Close()
		}()
	}
}

// exchange sends a byte and waits for it to come back.
func exchange(c net.Conn) error {
	b := [1]byte{'x'}
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:])
	return err
}

// visit is a whole visit to a limited server.
func (g *group) visit() error {
	c, err := g.dial(context.Background())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit(20 * time.Second)))
	for range 2 {
		if err := exchange(c); err != nil {
			return err
		}
	}
	return nil
}

// A LimitListener around each member: a member has no more connections than its
// limit, and nothing is lost when members close under load.
func TestLimitListenerAroundMembers(t *testing.T) {
	const most = 2
	inRows(t, func(t *testing.T, g *group) {
		servers := make(map[net.Listener]*limited)
		for _, m := range g.members {
			servers[m] = new(limited)
		}
		served := g.start(func(l net.Listener) error { return servers[l].serve(netutil.LimitListener(l, most)) })
		l := startLoad(t, 4*most*len(g.members), g.visit)
		g.leave(t, l, count(100, 20))
		l.end(t, g)
		require.NoError(t, g.close())
		require.NoError(t, wait(t, served))
		var sum int64
		for _, s := range servers {
			s.conns.Wait()
			sum += s.served.Load()
			require.LessOrEqual(t, s.most.Load(), int64(most))
		}
		require.Equal(t, l.answered.Load(), sum)
	})
}

// Dispatch around a LimitListener: all members together have no more
// connections than its limit, and nothing is lost when members close under load.
func TestDispatchAroundLimitListener(t *testing.T) {
	noLeaks(t)
	const most = 3
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g, err := dispatch(netutil.LimitListener(ln, most))
	require.NoError(t, err)
	t.Cleanup(func() { g.close() })
	var s limited
	served := g.start(s.serve)
	l := startLoad(t, 12, g.visit)
	g.leave(t, l, count(200, 20))
	l.end(t, g)
	require.NoError(t, g.close())
	require.NoError(t, wait(t, served))
	s.conns.Wait()
	require.EqualValues(t, most, s.most.Load())
	require.Equal(t, l.answered.Load(), s.served.Load())
}

// The limit is exact: what is past it waits in the kernel's queue, also when the
// member closes, and is accepted by a sibling when one of its connections ends.
func TestLimitIsExact(t *testing.T) {
	const most, clients = 3, 10
	test := func(t *testing.T, g *group, wrap func(net.Listener) net.Listener) {
		last := g.members[len(g.members)-1]
		limits := make(map[net.Listener]net.Listener)
		for _, m := range g.members {
			limits[m] = wrap(m)
		}
		conns := make([]net.Conn, clients)
		for i := range conns {
			var err error
			conns[i], err = g.dial(context.Background())
			require.NoError(t, err)
			defer conns[i].Close()
			conns[i].SetDeadline(time.Now().Add(limit(20 * time.Second)))
			_, err = fmt.Fprint(conns[i], "x")
			require.NoError(t, err)
		}
		// All but the last close without ever having accepted.
		for _, m := range g.members[:len(g.members)-1] {
			require.NoError(t, m.Close())
		}
		var s limited
		served := make(chan error, 1)
		go func() { served <- s.serve(limits[last]) }()

		answered := make(chan net.Conn, clients)
		for _, c := range conns {
			go func() {
				if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
					answered <- c
				}
			}()
		}
		looked := 0
		for i := range clients {
			require.Eventually(t, func() bool { return s.open.Load() == min(most, int64(clients-i)) }, limit(10*time.Second), time.Millisecond)
			if g.queued != nil {
				if n := g.queued(); n >= 0 {
					require.Equal(t, max(0, clients-most-i), n, "the others wait in the kernel")
					looked++
				}
			}
			var c net.Conn
			select {
			case c = <-answered:
			case <-time.After(limit(20 * time.Second)):
				t.Fatalf("%d of %d connections were answered", i, clients)
			}
			require.NoError(t, exchange(c))
			_, err := c.Read(make([]byte, 1))
			require.ErrorIs(t, err, io.EOF) // it has ended for the server too
		}
		require.EqualValues(t, most, s.most.Load())
		t.Logf("%d connections, %d at a time, %d inherited; %d looks at the queue", clients, s.most.Load(), g.stats().Inherited, looked)
		require.NoError(t, g.close())
		require.ErrorIs(t, wait(t, served), net.ErrClosed)
		s.conns.Wait()
		require.EqualValues(t, clients, s.served.Load())
	}
	inRows(t, func(t *testing.T, g *group) {
		test(t, g, func(l net.Listener) net.Listener { return netutil.LimitListener(l, most) })
	})
	t.Run("Dispatch around it", func(t *testing.T) {
		noLeaks(t)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		g, err := dispatch(netutil.LimitListener(ln, most))
		require.NoError(t, err)
		t.Cleanup(func() { g.close() })
		test(t, g, func(l net.Listener) net.Listener { return l })
	})
}
