// Package test tries the package with real servers, which are too heavy to be
// dependencies of it. Every server is run on every kind of listener, and on
// net.Listen itself as the control: what passes there must pass with ours.
package test

// What all tests use: the listeners that they run on, clients that count, and
// the check that nothing is leaked.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// slow is how many times slower than a usual machine this one is, from the
// environment variable LBLISTEN_TEST_SLOW: time limits are multiplied by it,
// counts divided.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || f < 1 {
		return 1
	}
	return f
}()

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// count is n on a usual machine, less on a slow one, and at least least.
func count(n, least int) int { return max(least, int(float64(n)/slow)) }

// workers are parts of tests that run in processes of their own, by name; the
// name is in the environment variable LBLISTEN_TEST_WORKER.
var workers = map[string]func(){}

func TestMain(m *testing.M) {
	if w := workers[os.Getenv("LBLISTEN_TEST_WORKER")]; w != nil {
		w()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// noLeaks fails the test if it leaves a goroutine or a descriptor.
func noLeaks(t testing.TB) {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	fds := openDescriptors()
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			return // whatever went wrong first is what to look at
		}
		goleak.VerifyNone(t, ignore)
		require.Eventually(t, func() bool { return openDescriptors() <= fds }, limit(5*time.Second), 5*time.Millisecond,
			"%d descriptors were open before the test", fds)
	})
}

// A group is listeners of one address.
type group struct {
	members []net.Listener
	serve   func(func(net.Listener) error) error // on all members, as Group.Serve does
	close   func() error
	queued  func() int   // connections queued in its sockets; -1 if the system doesn't tell, nil if nobody does
	dials   atomic.Int64 // connections that clients have opened
}

// rows are the kinds of listeners that every server runs on.
var rows = []struct {
	name string
	open func() (*group, error)
}{
	{"net.Listen", func() (*group, error) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		return single([]net.Listener{ln}), err
	}},
	{"Listen", func() (*group, error) {
		a, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithLB())
		if err != nil {
			return nil, err
		}
		b, err := lblisten.Listen("tcp", a.Addr().String(), lblisten.WithLB())
		return single([]net.Listener{a, b}), err
	}},
	{"kernel", func() (*group, error) { return listenGroup(lblisten.WithRequireKernel()) }},
	{"dispatcher", func() (*group, error) { return listenGroup(lblisten.WithDispatcher()) }},
	{"Dispatch", func() (*group, error) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		return dispatch(ln)
	}},
}

func listenGroup(opt lblisten.Option) (*group, error) {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, opt)
	if err != nil {
		return nil, err
	}
	return ofGroup(g), nil
}

// dispatch fans any listener out over 4 members.
func dispatch(ln net.Listener) (*group, error) {
	g, err := lblisten.Dispatch(ln, 4)
	if err != nil {
		return nil, err
	}
	return ofGroup(g), nil
}

func ofGroup(g *lblisten.Group) *group {
	og := &group{serve: g.Serve, close: g.Close, queued: func() int { return g.Stats().Queued }}
	for _, l := range g.Listeners() {
		og.members = append(og.members, l)
	}
	return og
}

// single is listeners that were opened one by one.
func single(members []net.Listener) *group {
	return &group{
		members: members,
		serve: func(serve func(net.Listener) error) (err error) {
			errs := make(chan error)
			for _, m := range members {
				go func() { errs <- serve(m) }()
			}
			for range members {
				if e := <-errs; e != nil {
					err = e
				}
			}
			return err
		},
		close: func() (err error) {
			for _, m := range members {
				if e := m.Close(); e != nil && !errors.Is(e, net.ErrClosed) {
					err = e
				}
			}
			return err
		},
	}
}

// inRows runs a test on every kind of listener.
func inRows(t *testing.T, f func(t *testing.T, g *group)) {
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			noLeaks(t)
			g, err := r.open()
			if errors.Is(err, lblisten.ErrUnsupported) {
				t.Skipf("not here: %v", err)
			}
			require.NoError(t, err)
			t.Cleanup(func() { g.close() })
			f(t, g)
		})
	}
}

func (g *group) addr() string { return g.members[0].Addr().String() }

// control tells whether this is net.Listen.
func (g *group) control() bool {
	_, ours := g.members[0].(*lblisten.Listener)
	return !ours
}

// stats are the sums over the members; nothing for the control.
func (g *group) stats() (s lblisten.Stats) {
	for _, m := range g.members {
		if l, ok := m.(*lblisten.Listener); ok {
			s.Accepted += l.Stats().Accepted
			s.Inherited += l.Stats().Inherited
		}
	}
	return s
}

// start serves all members. A member that closes ends nobody else.
func (g *group) start(serve func(net.Listener) error) <-chan error {
	done := make(chan error, 1)
	go func() {
		done <- g.serve(func(l net.Listener) error {
			if err := serve(l); !errors.Is(err, net.ErrClosed) {
				return err
			}
			return nil
		})
	}()
	return done
}

// A gated listener accepts only while its gate is open, so that connections wait
// in the kernel when it closes.
type gated struct {
	net.Listener
	gate gate
}

func (l gated) Accept() (net.Conn, error) {
	l.gate.shut()
	l.gate.open()
	return l.Listener.Accept()
}

// A gate holds a token while it is open.
type gate chan struct{}

func newGate() gate {
	g := make(gate, 1)
	g.open()
	return g
}

func (g gate) open() { g <- struct{}{} }
func (g gate) shut() { <-g }

// dial connects to the group and counts it.
func (g *group) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit(20*time.Second))
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", g.addr())
	if err == nil {
		g.dials.Add(1)
	}
	return c, err
}

// leave closes all members but the last, one by one, with n requests of the
// load around each.
func (g *group) leave(t testing.TB, l *load, n int) {
	t.Helper()
	for _, m := range g.members[:len(g.members)-1] {
		l.reach(t, n)
		require.NoError(t, m.Close())
	}
	l.reach(t, n)
}

// A load is clients that make requests one after the other.
type load struct {
	sent, answered, refused, failed atomic.Int64
	firstErr                        atomic.Pointer[error]
	stop                            atomic.Bool
	wg                              sync.WaitGroup
}

// startLoad starts clients. One that is refused ends.
func startLoad(t testing.TB, clients int, request func() error) *load {
	l := new(load)
	for range clients {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			for !l.stop.Load() {
				l.sent.Add(1)
				err := request()
				if err == nil {
					l.answered.Add(1)
					continue
				}
				if isRefused(err) {
					l.refused.Add(1)
					return
				}
				l.failed.Add(1)
				err = fmt.Errorf("after %d: %w", l.answered.Load(), err)
				l.firstErr.CompareAndSwap(nil, &err)
			}
		}()
	}
	t.Cleanup(func() {
		l.stop.Store(true)
		l.wg.Wait()
	})
	return l
}

// reach waits until n more requests are answered.
func (l *load) reach(t testing.TB, n int) {
	t.Helper()
	from := l.answered.Load()
	require.Eventually(t, func() bool { return l.answered.Load() >= from+int64(n) || l.failed.Load()+l.refused.Load() > 0 },
		limit(30*time.Second), time.Millisecond)
}

// end stops the load and checks that every request was answered.
func (l *load) end(t testing.TB, g *group) {
	t.Helper()
	l.stop.Store(true)
	l.wg.Wait()
	t.Logf("%s; %d connections, %d accepted, %d of them inherited", l, g.dials.Load(), g.stats().Accepted, g.stats().Inherited)
	if err := l.firstErr.Load(); err != nil {
		t.Fatalf("the first that failed: %v", *err)
	}
	require.Zero(t, l.refused.Load())
	require.NotZero(t, l.answered.Load())
	require.Equal(t, l.sent.Load(), l.answered.Load())
	if !g.control() {
		require.Eventually(t, func() bool { return g.stats().Accepted == uint64(g.dials.Load()) }, limit(10*time.Second), time.Millisecond,
			"%d connections were opened", g.dials.Load())
	}
}

func (l *load) String() string {
	return fmt.Sprintf("%d requests sent, %d answered, %d refused, %d failed", l.sent.Load(), l.answered.Load(), l.refused.Load(), l.failed.Load())
}

// wait is for the end of a serve.
func wait(t testing.TB, ch <-chan error) error {
	t.Helper()
	select {
	case err := <-ch:
		return err
	case <-time.After(limit(20 * time.Second)):
		t.Fatal("Serve doesn't return")
		return nil
	}
}
