package lblisten

// Faults that every system has: an Accept that fails, a loop that stands still
// or panics, a queue that is full, a client that is gone before it is accepted,
// a listener that can't be opened. What each test promises is its first sentence;
// it counts that nothing else is lost.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A flaky listener's Accept fails at random. It remembers each error.
type flaky struct {
	net.Listener
	mu     sync.Mutex
	random *rand.Rand
	calls  int
	failed []error
	sound  bool // it fails no more
}

func (f *flaky) Accept() (net.Conn, error) {
	if err := f.draw(); err != nil {
		return nil, err
	}
	return f.Listener.Accept()
}

func (f *flaky) draw() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	i := f.random.IntN(3 * len(passingErrors))
	if i >= len(passingErrors) || f.sound {
		return nil
	}
	err := &net.OpError{Op: "accept", Net: "tcp", Addr: f.Addr(), Err: passingErrors[i]}
	f.failed = append(f.failed, err)
	return err
}

// flakyDeadline can be interrupted too, as net's listeners can.
type flakyDeadline struct{ *flaky }

func (f flakyDeadline) SetDeadline(t time.Time) error {
	return f.Listener.(*net.TCPListener).SetDeadline(t)
}

// An Accept that fails at random, of a listener under Dispatch, fails one caller
// each time, with that very error, is called no more often than it is asked
// for, and every connection is served.
func TestAcceptFailsAtRandom(t *testing.T) {
	for _, canWake := range []bool{true, false} {
		for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
			t.Run(fmt.Sprintf("%v, deadline %v", s, canWake), func(t *testing.T) {
				noLeaks(t)
				tcp, err := net.Listen("tcp", "127.0.0.1:0")
				require.NoError(t, err)
				f := &flaky{Listener: tcp, random: rand.New(rand.NewPCG(1, 2))}
				var ln net.Listener = f
				if canWake {
					ln = flakyDeadline{f}
				}
				g, ls := dispatchTest(t, ln, 4, WithSteering(s))
				var wg sync.WaitGroup
				var mu sync.Mutex
				var got []error
				var accepted atomic.Int64
				for _, l := range ls {
					wg.Add(1)
					go func() {
						defer wg.Done()
						for {
							c, err := l.Accept()
							switch {
							case errors.Is(err, net.ErrClosed):
								return
							case err != nil:
								mu.Lock()
								got = append(got, err)
								mu.Unlock()
							default:
								accepted.Add(1)
								wg.Add(1)
								go func() {
									defer wg.Done()
									echoConn(c)
								}()
							}
						}
					}()
				}
				d := new(load)
				var clients sync.WaitGroup
				for range 8 {
					clients.Add(1)
					go func() {
						defer clients.Done()
						for range count(125, 10) {
							d.one("tcp", tcp.Addr().String())
						}
					}()
				}
				clients.Wait()
				f.mu.Lock()
				f.sound = true
				failed, calls := f.failed, f.calls
				f.mu.Unlock()
				require.Eventually(t, func() bool {
					mu.Lock()
					defer mu.Unlock()
					return len(got) >= len(failed)
				}, limit(5*time.Second), time.Millisecond)
				require.NoError(t, g.Close())
				wg.Wait()
				d.end(t, false)
				t.Logf("%d Accepts of the listener: %d connections, %d errors", calls, accepted.Load(), len(failed))
				require.NotEmpty(t, failed)
				require.Len(t, got, len(failed))
				seen := make(map[error]bool)
				for _, err := range got {
					seen[err] = true
				}
				for _, err := range failed {
					require.True(t, seen[err], "%v came to nobody", err)
				}
				require.LessOrEqual(t, calls, int(accepted.Load())+len(failed)+1, "it spins")
			})
		}
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

// Queues that are full lose nothing: what the kernel doesn't let in tries again,
// and all are served when somebody accepts.
func TestFullQueue(t *testing.T) {
	if !setsBacklog() {
		t.Skipf("a queue's length can't be set on %s", runtime.GOOS)
	}
	inModes(t, func(t *testing.T, m mode) {
		for backlog := 1; backlog <= 8; backlog *= 2 { // each tries again at the same time
			g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt, WithBacklog(backlog))
			n := 6*backlog + 4
			var served, refused atomic.Int64
			var wg, clients sync.WaitGroup
			t.Cleanup(func() { g.Close(); wg.Wait() })
			for range n {
				clients.Add(1)
				go func() {
					defer clients.Done()
					for begin := time.Now(); time.Since(begin) < limit(20*time.Second); refused.Add(1) {
						d := new(load)
						if d.one("tcp", g.Addr().String()); d.served.Load() == 1 {
							served.Add(1)
							return
						}
						time.Sleep(10 * time.Millisecond)
					}
				}()
			}
			full := func() bool {
				queued, most := g.Stats().Queued, g.Stats().Backlog
				return queued < 0 || queued >= most
			}
			require.Eventually(t, full, limit(10*time.Second), time.Millisecond)
			queued := g.Stats().Queued
			var accepted atomic.Int64
			for _, l := range ls {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
			t.Cleanup(func() {
				clients.Wait()
				g.Close()
				wg.Wait()
				t.Logf("backlog %d: %d tried, %d lost; %d waited in full queues, %d tries were refused", backlog, n, n-int(served.Load()), queued, refused.Load())
				if int(served.Load()) != n {
					t.Errorf("%d of %d were served", served.Load(), n)
				}
			})
		}
	})
}

// resetOnWindows: package net returns its own error then, and these tests' loops
// end at one.
const resetOnWindows = "under wine, Accept fails with WSAENOTCONN for a connection that its client has reset, also net's"

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

// A serve that panics and recovers ends nobody else, and what waits in its queue
// is served: by the siblings if it closes its listener, by itself if it goes on.
func TestPanicInServe(t *testing.T) {
	for _, goesOn := range []bool{true, false} {
		t.Run(map[bool]string{true: "goes on", false: "closes"}[goesOn], func(t *testing.T) {
			inModes(t, func(t *testing.T, m mode) {
				g, _ := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
				n := count(200, 30)
				died := int64(1)
				if goesOn {
					died = 10
				}
				conns := queueUp(t, g.Addr(), n)
				var panics, accepted atomic.Int64
				var wg sync.WaitGroup
				handle := func(c net.Conn) {
					if panics.Add(1) <= died {
						c.Close()
						panic("a test says so")
					}
					accepted.Add(1)
					wg.Add(1)
					go func() {
						defer wg.Done()
						echoConn(c)
					}()
				}
				loop := func(l net.Listener) (err error) {
					defer func() {
						if recover() != nil && !goesOn {
							l.Close()
						}
					}()
					for {
						c, err := l.Accept()
						if err != nil {
							return err
						}
						handle(c)
					}
				}
				ended := make(chan error)
				go func() {
					ended <- g.Serve(func(l net.Listener) error {
						for {
							if err := loop(l); err != nil || !goesOn {
								return err
							}
						}
					})
				}()
				served := answered(conns)
				for _, c := range conns {
					c.Close()
				}
				require.NoError(t, g.Close())
				require.ErrorIs(t, <-ended, net.ErrClosed)
				wg.Wait()
				t.Logf("%d tried, %d lost; %d died in a panic", n, n-served-int(died), died)
				require.Equal(t, n, served+int(died))
			})
		})
	}
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
