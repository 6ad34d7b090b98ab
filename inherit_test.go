package lblisten

// What becomes of a queue when its member closes, or never accepts.

import (
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Five members, 25 clients in their queues, four members close: all 25 come out
// at the fifth, with their data.
func TestSiblingInheritsQueue(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range endpoints {
			t.Run(e.name, func(t *testing.T) {
				e.need(t)
				g, ls := newTestGroup(t, 5, e.network, e.listen, m.opt)
				addr, err := net.ResolveTCPAddr("tcp", e.of(g.Addr()))
				require.NoError(t, err)
				clients := queueUp(t, addr, 25)
				for _, l := range ls[:4] {
					require.NoError(t, l.Close())
				}
				if q := queuedAt(ls[4]); q >= 0 {
					require.Equal(t, 25, q, "something was accepted that nobody asked for")
				}
				for range clients {
					n := answer(t, acceptWithin(t, ls[4]))
					wantAnswer(t, clients[n], n)
				}
				_, err = acceptBy(ls[4], 20*time.Millisecond)
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				s := ls[4].Stats()
				require.EqualValues(t, 25, s.Accepted)
				if m.name == "kernel" {
					require.NotZero(t, s.Inherited)
				}
			})
		}
	})
}

// A heir that is blocked in Accept already gets what a closing sibling leaves:
// the connections that wait, and those that arrive in its socket later.
func TestBlockedHeirIsWoken(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		heir, closing := ls[0], ls[1]
		if m.name == "kernel" {
			// Fill the queue of the one that closes, by letting the heir take all else.
			for !ownQueued(closing) {
				c := dialTest(t, heir.Addr())
				_, err := c.Write([]byte("0\n"))
				require.NoError(t, err)
				if ownQueued(heir) {
					acceptWithin(t, heir)
				}
			}
		}
		got := blocked(t, heir)
		require.NoError(t, closing.Close())
		if m.name == "dispatcher" {
			dialTest(t, heir.Addr())
		}
		require.NoError(t, get(t, got).err)

		// Later arrivals, of which about half go to the closed member's socket.
		for range count(200, 20) {
			got := blocked(t, heir)
			c := dialTest(t, heir.Addr())
			r := get(t, got)
			require.NoError(t, r.err)
			require.Equal(t, c.LocalAddr().String(), r.c.RemoteAddr().String())
			r.c.Close()
			c.Close()
		}
	})
}

// A blocked heir is served at once, however many siblings close together.
func TestHeirOfManyIsWoken(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	for range count(20, 3) {
		g, _ := newTestGroup(t, count(100, 20), "tcp", "127.0.0.1:0", WithRequireKernel())
		heir := joinTest(t, g.Listeners()[0], WithRequireKernel())
		for !ownQueued(heir) && g.Stats().Queued < 1 {
			dialTest(t, g.Addr())
		}
		if ownQueued(heir) {
			acceptWithin(t, heir)
			dialTest(t, g.Addr())
		}
		got := make(chan result, 1)
		go func() {
			c, err := heir.Accept()
			got <- result{c, err}
		}()
		require.NoError(t, g.Close())
		require.NoError(t, get(t, got).err)
		require.NoError(t, heir.Close())
	}
}

// A member that is kicked just as it closes passes the kick on. With two
// members, of which one closes while connections arrive in a shared socket, the
// other must get every one of them.
func TestKickOfClosingMemberIsPassedOn(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	var heir *Listener
	for round := range count(3000, 100) {
		if round%100 == 0 { // before the kernel steers nothing to the shared sockets any more
			_, ls := newTestGroup(t, 1, "tcp", "127.0.0.1:0", WithRequireKernel())
			heir = ls[0]
		}
		other, l := joinTest(t, heir, WithRequireKernel()), joinTest(t, heir, WithRequireKernel())
		require.NoError(t, other.Close()) // its socket is shared, because both others have their own
		require.Equal(t, 3, heir.Info().Sockets)
		a, b := blocked(t, heir), blocked(t, l)
		c := dialTest(t, heir.Addr())
		require.NoError(t, l.Close())
		rb := get(t, b)
		if rb.err == nil {
			require.NoError(t, heir.SetDeadline(longPast))
			require.ErrorIs(t, get(t, a).err, os.ErrDeadlineExceeded)
			require.NoError(t, heir.SetDeadline(time.Time{}))
			rb.c.Close()
		} else {
			ra := get(t, a)
			require.NoError(t, ra.err)
			ra.c.Close()
		}
		c.Close() // the next round's members adopt both sockets
	}
}

// All members but one close, in any order, one after the other or two at once;
// what waited is served by who is left. The heir may close while it inherits.
func TestCloseInAnyOrder(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for round := range count(20, 3) {
			g, ls := newTestGroup(t, 6, "tcp", "127.0.0.1:0", m.opt)
			clients := queueUp(t, g.Addr(), 30)
			rand.Shuffle(len(ls), func(i, j int) { ls[i], ls[j] = ls[j], ls[i] })
			last := ls[5]
			if round%2 == 0 {
				for _, l := range ls[:5] {
					require.NoError(t, l.Close())
				}
			} else {
				var wg sync.WaitGroup
				for _, l := range ls[:5] {
					wg.Add(1)
					go func() {
						defer wg.Done()
						if err := l.Close(); err != nil {
							t.Error(err)
						}
					}()
				}
				wg.Wait()
			}
			for range clients {
				n := answer(t, acceptWithin(t, last))
				wantAnswer(t, clients[n], n)
			}
			require.NoError(t, last.Close())
			for _, c := range clients {
				c.Close()
			}
		}
	})
}

// Members join and close 100 times under continuous dials, and every dial is
// answered.
func TestJoinAndLeaveUnderLoad(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range []endpoint{endpoints[0], endpoints[2]} {
			t.Run(e.name, func(t *testing.T) {
				e.need(t)
				g, ls := newTestGroup(t, 2, e.network, e.listen, m.opt)
				var wg sync.WaitGroup
				var accepted atomic.Int64
				wg.Add(2)
				go echo(&wg, ls[0], &accepted)
				go echo(&wg, ls[1], &accepted)
				d := startLoad(8, "tcp", e.of(g.Addr()))
				for range count(100, 10) {
					l, err := Listen(e.network, g.Addr().String(), m.opt)
					require.NoError(t, err)
					wg.Add(1)
					go echo(&wg, l, &accepted)
					at := d.served.Load() + 20
					require.Eventually(t, func() bool { return d.served.Load() > at || d.failed.Load() > 0 }, limit(10*time.Second), time.Millisecond)
					require.NoError(t, l.Close())
				}
				d.end(t, true)
				require.NoError(t, g.Close())
				wg.Wait()
				require.GreaterOrEqual(t, accepted.Load(), d.served.Load())
			})
		}
	})
}

// However often members are replaced, a new one takes over the socket that a
// closed one left: the number of sockets stays what it was.
func TestNewMemberAdoptsSocket(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", WithRequireKernel())
	clients := queueUp(t, g.Addr(), 40)
	for i := range 50 {
		require.NoError(t, ls[0].Close())
		ls = append(ls[1:], joinTest(t, ls[1], WithRequireKernel()))
		require.Equal(t, 4, ls[0].Info().Sockets, "after %d replacements", i+1)
	}
	// New before old: one socket more, and not one more each time.
	for i := range 50 {
		ls = append(ls, joinTest(t, ls[0], WithRequireKernel()))
		require.NoError(t, ls[0].Close())
		ls = ls[1:]
		require.LessOrEqual(t, ls[0].Info().Sockets, 5, "after %d replacements", i+1)
	}
	// Everything waits still, and is served by whoever has it now.
	var wg sync.WaitGroup
	for _, l := range ls {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				answer(t, c)
				c.Close()
			}
		}()
	}
	for i, c := range clients {
		wantAnswer(t, c, i)
	}
	for _, l := range ls {
		require.NoError(t, l.Close())
	}
	wg.Wait()
}

// When the last member closes, its queue is reset, later dials are refused, and
// nothing is left.
func TestLastCloseResets(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
		clients := queueUp(t, g.Addr(), 12)
		for _, l := range ls {
			require.NoError(t, l.Close())
		}
		for _, c := range clients {
			c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
			_, err := c.Read(make([]byte, 1))
			require.Error(t, err)
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
		}
		_, err := net.Dial("tcp", g.Addr().String())
		require.Error(t, err)
		// The address is free for anybody.
		ln, err := net.Listen("tcp", g.Addr().String())
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	})
}

// A member whose own queue and a shared one are both never empty serves both.
func TestOwnAndSharedAreBothServed(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel())
	// Both queues hold half of what one can at the least.
	clients := queueUp(t, g.Addr(), 80)
	require.NoError(t, ls[1].Close())
	inherited := ls[0].Stats().Inherited
	for range 20 {
		acceptWithin(t, ls[0])
	}
	inherited = ls[0].Stats().Inherited - inherited
	require.GreaterOrEqual(t, inherited, uint64(5), "the shared socket starves")
	require.LessOrEqual(t, inherited, uint64(15), "the member's own socket starves")
	for range len(clients) - 20 {
		acceptWithin(t, ls[0])
	}
}

// A member that never accepts keeps nothing from the siblings of a dispatcher's
// group, and by the kernel only what is in its own queue, which they get when it
// closes.
func TestMemberThatNeverAccepts(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", m.opt)
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls[1:] {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		n := count(400, 40)
		conns := queueUp(t, g.Addr(), n)
		if m.name == "dispatcher" {
			require.Equal(t, n, answered(conns))
		} else {
			require.Eventually(t, func() bool {
				queued := ls[0].Stats().Queued
				return queued < 0 || int(accepted.Load())+queued == n
			}, limit(10*time.Second), time.Millisecond)
			t.Logf("%d of %d wait for it", n-int(accepted.Load()), n)
			require.NotZero(t, n-int(accepted.Load()))
			require.NoError(t, ls[0].Close())
			require.Equal(t, n, answered(conns))
		}
		for _, c := range conns {
			c.Close()
		}
		require.NoError(t, g.Close())
		wg.Wait()
		t.Logf("%d tried, %d lost", n, n-int(accepted.Load()))
		require.EqualValues(t, n, accepted.Load())
	})
}

// Clients that reset their connections before these are accepted, with and
// without data, end no Accept and cost no other client its connection, also in
// a queue that is inherited.
func TestResetBeforeAccept(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip(resetOnWindows)
	}
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
		n := count(200, 20)
		var conns []net.Conn
		for i := range n {
			if i%2 == 0 {
				dialTest(t, g.Addr()).Close() // resets: see dialOnce
			} else {
				queueUp(t, g.Addr(), 1)[0].Close()
			}
			conns = append(conns, queueUp(t, g.Addr(), 1)...)
		}
		require.NoError(t, ls[0].Close())
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls[1:] {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		served := answered(conns)
		for _, c := range conns {
			c.Close()
		}
		require.NoError(t, g.Close())
		wg.Wait()
		t.Logf("%d tried, %d lost, beside %d that were reset; %d accepted", n, n-served, n, accepted.Load())
		require.Equal(t, n, served)
		require.LessOrEqual(t, int(accepted.Load()), 2*n)
	})
}

// What comes through a closed member's socket counts as inherited for a while, although
// nobody adopts it: a service that has been restarted is a steady one again.
func TestInheritedEnds(t *testing.T) {
	if !alone(t) {
		return
	}
	modes[0].need(t)
	inheritedFor = limit(200 * time.Millisecond)
	_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", modes[0].opt)
	inherited := func() uint64 {
		begin := ls[0].Stats().Inherited
		for range 40 {
			c := dialTest(t, ls[0].Addr())
			require.NoError(t, acceptWithin(t, ls[0]).Close())
			c.Close()
		}
		return ls[0].Stats().Inherited - begin
	}
	require.NoError(t, ls[1].Close())
	require.NotZero(t, inherited())
	time.Sleep(inheritedFor)
	require.Zero(t, inherited())
}
