package lblisten

// The dispatcher with many Accepts at once, and with none to spare.

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A token is a connection that can be told from all others.
type token struct {
	net.Conn
	from   addressedConn
	number int
	closed atomic.Bool
}

func (c *token) LocalAddr() net.Addr { return c.from.local }

func (c *token) RemoteAddr() net.Addr { return c.from.remote }

func (c *token) Close() error {
	c.closed.Store(true)
	return nil
}

// patient is conns without deadlines.
type patient struct{ *acceptor }

func (patient) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// Few members with many Accepts each, whose deadlines come and go, and all of
// which but one close: each connection of the listener comes out of exactly one
// Accept, no Accept returns one after its deadline, none hangs, and all that may
// be told of an error that passes is one. What the leader alone does without a
// lock is in doubt in every one of these.
func TestDispatchStress(t *testing.T) {
	for _, listener := range []string{"interruptible", "uninterruptible"} {
		for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
			for _, members := range []int{1, 2, 4} {
				t.Run(fmt.Sprintf("%s, %v, %d", listener, s, members), func(t *testing.T) {
					noLeaks(t)
					soakRounds(t, period(100*time.Millisecond), 18, func(seed uint64) {
						a := newAcceptor()
						var ln net.Listener = &conns{acceptor: a, wake: make(chan struct{})}
						if listener == "uninterruptible" {
							ln = patient{a}
						}
						stressDispatch(t, seed, ln, a, s, members)
					})
				})
			}
		}
	}
}

func stressDispatch(t *testing.T, seed uint64, ln net.Listener, a *acceptor, steering Steering, members int) {
	r := rand.New(rand.NewPCG(seed, 2))
	st := &soak{t: t, nap: 10 * time.Microsecond}
	tokens := size(100+r.IntN(600), 20)
	returned := make([]atomic.Int32, tokens)
	var last atomic.Int32
	st.got = func(c net.Conn) {
		if c := c.(*token); returned[c.number].Add(1) != 1 || c.closed.Load() {
			st.errorf("connection %d was returned twice, or is closed", c.number)
		}
		last.Add(1)
	}
	var passed atomic.Int32
	st.passing = func(err error) bool {
		if !errors.Is(err, outOfFiles{}) {
			return false
		}
		passed.Add(1)
		return true
	}
	g, ls := dispatchTest(t, ln, members, WithSteering(steering))
	var all []*soaked
	for _, l := range ls {
		m := newSoaked(l)
		all = append(all, m)
		for range []int{1, 1, 2, 16}[r.IntN(4)] {
			st.open.Add(1)
			go func() {
				defer st.open.Done()
				st.loop(m)
			}()
		}
	}

	// Somebody who sets deadlines, closes, and asks, and somebody who connects.
	calm := r.IntN(4) == 0 // without deadlines and closes: each error that passes reaches an Accept
	failed := 0
	fed := make(chan error, 1)
	feeder := rand.New(rand.NewPCG(seed, 3))
	go func() {
		for i := range tokens {
			c := &token{number: i, from: flow(fmt.Sprintf("192.0.2.%d", feeder.IntN(64)), i)}
			late := time.After(limit(20 * time.Second))
			if feeder.IntN(100) == 0 {
				select {
				case a.errs <- outOfFiles{}:
					failed++
				case <-late:
				}
			}
			select {
			case a.conns <- c:
			case <-late:
				fed <- fmt.Errorf("nobody asks for connection %d of %d", i, tokens)
				return
			}
			if feeder.IntN(8) == 0 {
				time.Sleep(time.Duration(feeder.IntN(100)) * time.Microsecond)
			}
		}
		fed <- nil
	}()
	var err error
	for fedAll := false; !fedAll; {
		select {
		case err = <-fed:
			fedAll = true
		default:
			i := r.IntN(len(all))
			m := all[i]
			switch what := r.IntN(12); {
			case m.closed:
			case calm:
				m.Stats()
			case what < 3:
				st.check(m.setDeadline(longPast, true, false))
			case what < 5:
				st.check(m.setDeadline(time.Now().Add(time.Duration(r.IntN(200))*time.Microsecond), false, false))
			case what < 9:
				st.check(m.setDeadline(time.Time{}, false, true))
			case what < 10:
				m.Stats()
				g.Info()
			case i > 0 && r.IntN(20) == 0: // the first one stays
				m.closed = true
				m.change(func() { m.done = true })
				st.check(m.Close())
			}
			if r.IntN(2) == 0 {
				time.Sleep(time.Duration(r.IntN(40)) * time.Microsecond)
			}
		}
	}
	require.NoError(t, err, "seed %d", seed)
	for _, m := range all {
		if !m.closed {
			st.check(m.setDeadline(time.Time{}, false, true))
		}
	}
	require.Eventually(t, func() bool { return int(last.Load()) >= tokens }, limit(20*time.Second), time.Millisecond,
		"seed %d: %d connections of %d came out", seed, &last, tokens)
	for _, m := range all {
		m.change(func() { m.done = true })
	}
	require.NoError(t, g.Close())
	ended := make(chan struct{})
	go func() {
		st.open.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(limit(20 * time.Second)):
		buf := make([]byte, 1<<20)
		t.Fatalf("seed %d: an Accept hangs\n%s", seed, buf[:runtime.Stack(buf, true)])
	}
	require.NoError(t, errors.Join(st.errs...), "seed %d", seed)
	require.LessOrEqual(t, int(passed.Load()), failed, "seed %d: an error reached several", seed)
	if calm {
		require.EqualValues(t, failed, passed.Load(), "seed %d: an error reached nobody", seed)
	}
	require.Zero(t, undelivered(ls[0]), "seed %d", seed)
	var accepted uint64
	for _, l := range ls {
		accepted += l.Stats().Accepted
	}
	require.EqualValues(t, tokens, accepted, "seed %d", seed)
	for _, l := range ls {
		require.Zero(t, waiting(l), "seed %d", seed)
	}
}

// A few Accepts, none of which is followed by another one, so that nobody comes
// who would make good what was forgotten: each returns, with the lead going
// through all of them, although the one or the other times out.
func TestDispatchOneAcceptEach(t *testing.T) {
	for _, listener := range []string{"interruptible", "uninterruptible"} {
		for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
			t.Run(listener+", "+s.String(), func(t *testing.T) {
				noLeaks(t)
				a := newAcceptor()
				var ln net.Listener = &conns{acceptor: a, wake: make(chan struct{})}
				if listener == "uninterruptible" {
					ln = patient{a}
				}
				g, ls := dispatchTest(t, ln, 2, WithSteering(s))
				fed, got, timeouts := 0, 0, 0
				soakRounds(t, period(200*time.Millisecond), 6, func(seed uint64) {
					r := rand.New(rand.NewPCG(seed, 5))
					n := 2 + r.IntN(3)
					results := make(chan result, n)
					for i := range n {
						l, yields, deadline := ls[r.IntN(2)], r.IntN(4), i > 0 && r.IntN(8) == 0
						go func() {
							for range yields {
								runtime.Gosched()
							}
							if deadline {
								l.SetDeadline(longPast)
								l.SetDeadline(time.Time{})
							}
							c, err := l.Accept()
							results <- result{c, err}
						}()
					}
					late := time.After(limit(20 * time.Second))
					for n > 0 {
						c := &token{from: flow(fmt.Sprintf("192.0.2.%d", r.IntN(64)), fed)}
						select {
						case a.conns <- c:
							fed++
						case r := <-results:
							n--
							if r.err == nil {
								got++
							} else if timeouts++; !errors.Is(r.err, os.ErrDeadlineExceeded) {
								t.Errorf("Accept: %v", r.err)
							}
						case <-late:
							buf := make([]byte, 1<<20)
							t.Fatalf("seed %d: %d Accepts hang\n%s", seed, n, buf[:runtime.Stack(buf, true)])
						}
					}
				})
				for fed > got { // one came too late, or is held
					_, err := acceptBy(ls[got%2], limit(10*time.Second))
					require.NoError(t, err)
					got++
				}
				require.NoError(t, g.Close())
				t.Logf("%d tried, 0 lost; %d timeouts", got, timeouts)
			})
		}
	}
}

// A connection that is given away in the instant in which Accept looks whether its
// deadline has passed, or its member was closed, goes to another one.
func TestDispatchNothingAfterTheEnd(t *testing.T) {
	for _, end := range []struct {
		name string
		do   func(l *Listener) error
		err  error
	}{
		{"deadline", func(l *Listener) error { return l.SetDeadline(longPast) }, os.ErrDeadlineExceeded},
		{"close", (*Listener).Close, net.ErrClosed},
	} {
		t.Run(end.name, func(t *testing.T) {
			noLeaks(t)
			g, ls := dispatchTest(t, newConns(), 2)
			give := slowGiver(g)
			require.NoError(t, end.do(ls[0]))
			var given atomic.Int64
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				c := &token{from: flow("192.0.2.1", 1)}
				for {
					select {
					case <-stop:
						return
					default:
					}
					if give(c) {
						given.Add(1)
					}
				}
			}()
			for range count(300_000, 10_000) {
				if c, err := ls[0].Accept(); !errors.Is(err, end.err) {
					t.Errorf("Accept: %v, %v", c, err)
					break
				}
			}
			close(stop)
			<-stopped
			require.Zero(t, given.Load())
			require.NoError(t, ls[1].Close())
		})
	}
}

// The same on a socket, where members join too.
func TestDispatchStressOnSocket(t *testing.T) {
	noLeaks(t)
	for _, steering := range []Steering{SteerFlow, SteerSource, SteerLoad} {
		t.Run(steering.String(), func(t *testing.T) {
			var sum totals
			soakRounds(t, period(500*time.Millisecond), 3, func(seed uint64) {
				r := rand.New(rand.NewPCG(seed, 4))
				s := &soak{t: t, nap: 10 * time.Microsecond, m: modes[1], e: endpoints[0], steering: steering, loops: 16}
				plan := []operation{{do: "join", n: 1 + r.IntN(2)}, {do: "load", n: 1 + r.IntN(6)}}
				timed, taken := [2]bool{}, false
				for range 100 {
					o := operation{wait: time.Duration(r.IntN(300)) * time.Microsecond}
					switch what := r.IntN(10); {
					case what < 2 && !taken:
						o.do, o.on, o.n, taken = "join", 1, 1, true
					case what < 2:
						o.do, o.on, taken, timed[1] = "close", 1, false, false
					default:
						if taken {
							o.on = r.IntN(2)
						}
						o.do, o.n = []string{"deadline past", "deadline soon"}[r.IntN(2)], 1+r.IntN(300)
						if timed[o.on] {
							o.do = "deadline off"
						}
						timed[o.on] = !timed[o.on]
					}
					plan = append(plan, o)
				}
				plan = append(plan, operation{do: "deadline off"}, operation{do: "end"}, operation{do: "begin again", n: 2})
				var err error
				s.history.watch(seed, func() { err = s.run(seed, plan) })
				sum.add(&s.clients, len(plan))
				if err != nil {
					t.Errorf("seed %d: %v\nafter\n%s", seed, err, &s.history)
				}
			})
			t.Log(&sum)
		})
	}
}
