package lblisten

// The dispatcher, over sockets and over listeners that are none.

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/netutil"
)

func dispatchTest(t testing.TB, ln net.Listener, n int, opts ...Option) (*Group, []*Listener) {
	t.Helper()
	g, err := Dispatch(ln, n, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	return g, g.Listeners()
}

// acceptor is a listener without a socket. It counts its Accepts in progress.
type acceptor struct {
	conns chan net.Conn
	errs  chan error
	done  chan struct{}
	once  sync.Once
	waits atomic.Int64
}

func (a *acceptor) Accept() (net.Conn, error) {
	a.waits.Add(1)
	defer a.waits.Add(-1)
	select {
	case c := <-a.conns:
		return c, nil
	case err := <-a.errs:
		return nil, err
	case <-a.done:
		return nil, net.ErrClosed
	}
}

func (a *acceptor) Close() error {
	a.once.Do(func() { close(a.done) })
	return nil
}

func (a *acceptor) Addr() net.Addr { return pipeAddr{} }

func newAcceptor() *acceptor {
	return &acceptor{conns: make(chan net.Conn), errs: make(chan error), done: make(chan struct{})}
}

// hand gives v to the Accept that waits for it.
func hand[T any](t testing.TB, to chan<- T, v T) {
	t.Helper()
	select {
	case to <- v:
	case <-time.After(limit(5 * time.Second)):
		t.Fatal("the listener is not asked for a connection")
	}
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }

func (pipeAddr) String() string { return "pipe" }

// pipeConn is a connection that tells when it is closed.
type pipeConn struct {
	net.Conn
	closed atomic.Bool
}

func (c *pipeConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

func newPipeConn(t testing.TB) *pipeConn {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return &pipeConn{Conn: a}
}

// conns hands out connections with given addresses, and can be interrupted.
type conns struct {
	*acceptor
	mu   sync.Mutex
	wake chan struct{}
}

func (c *conns) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.wake:
		if t.IsZero() {
			c.wake = make(chan struct{})
		}
	default:
		if !t.IsZero() {
			close(c.wake)
		}
	}
	return nil
}

func (c *conns) Accept() (net.Conn, error) {
	c.mu.Lock()
	wake := c.wake
	c.mu.Unlock()
	select {
	case conn := <-c.conns:
		return conn, nil
	case err := <-c.errs:
		return nil, err
	case <-c.done:
		return nil, net.ErrClosed
	case <-wake:
		return nil, os.ErrDeadlineExceeded
	}
}

func (c *conns) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func newConns() *conns {
	return &conns{acceptor: newAcceptor(), wake: make(chan struct{})}
}

type sourceConn struct {
	*pipeConn
	addressedConn
}

func (c sourceConn) Close() error { return c.pipeConn.Close() }

func (c sourceConn) Read(b []byte) (int, error) { return c.pipeConn.Read(b) }

func (c sourceConn) Write(b []byte) (int, error) { return c.pipeConn.Write(b) }

func (c sourceConn) SetDeadline(t time.Time) error { return c.pipeConn.SetDeadline(t) }

func (c sourceConn) SetReadDeadline(time.Time) error { return nil }

func (c sourceConn) SetWriteDeadline(time.Time) error { return nil }

func (c sourceConn) LocalAddr() net.Addr { return c.local }

func (c sourceConn) RemoteAddr() net.Addr { return c.remote }

// outOfFiles is what EMFILE is on every system.
type outOfFiles struct{}

func (outOfFiles) Error() string { return "too many open files" }

func (outOfFiles) Temporary() bool { return true }

func (outOfFiles) Timeout() bool { return false }

// Dispatch refuses what it can't do, and leaves the listener alone then.
func TestDispatchRefuses(t *testing.T) {
	noLeaks(t)
	_, err := Dispatch(nil, 1)
	require.Error(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	for _, c := range []struct {
		n    int
		opt  Option
		want string
	}{
		{0, WithSteering(SteerFlow), "0 members"}, {1_000_000, WithSteering(SteerFlow), "1000000"},
		{2, WithLB(), "WithLB"}, {2, WithBacklog(3), "WithBacklog"}, {2, WithReusePort(), "WithReusePort"},
		{2, WithListenConfig(net.ListenConfig{}), "WithListenConfig"}, {2, WithSteering(SteerCPU), "cpu"}, {2, Option{}, "option"},
	} {
		_, err := Dispatch(ln, c.n, c.opt)
		require.ErrorContains(t, err, c.want)
		require.ErrorContains(t, err, ln.Addr().String())
	}
	dialTest(t, ln.Addr())
	acceptWithin(t, ln)
	require.NoError(t, ln.Close())
	_, err = Dispatch(newAcceptor(), 2, WithSteering(SteerSource))
	require.ErrorIs(t, err, ErrUnsupported)
}

// A listener that is no socket and can't be interrupted is asked only while a
// member waits; a connection that comes too late is the next Accept's; the last
// Close closes what is in hand.
func TestDispatchOfAListenerWithoutDeadline(t *testing.T) {
	noLeaks(t)
	a := newAcceptor()
	_, ls := dispatchTest(t, a, 3)
	require.Equal(t, -1, ls[0].Stats().Queued)
	time.Sleep(10 * time.Millisecond)
	require.Zero(t, a.waits.Load(), "it is asked for connections that nobody wants")

	got := blocked(t, ls[0])
	c := newPipeConn(t)
	hand(t, a.conns, net.Conn(c))
	require.Equal(t, net.Conn(c), get(t, got).c)
	require.Eventually(t, func() bool { return a.waits.Load() == 0 }, limit(5*time.Second), time.Millisecond)

	// The deadline is kept although the listener has none.
	asked := func() {
		t.Helper()
		require.Eventually(t, func() bool { return a.waits.Load() == 1 }, limit(5*time.Second), time.Millisecond)
	}
	got = blocked(t, ls[1])
	asked()
	require.NoError(t, ls[1].SetDeadline(time.Now().Add(5*time.Millisecond)))
	require.ErrorIs(t, get(t, got).err, os.ErrDeadlineExceeded)
	late := newPipeConn(t)
	hand(t, a.conns, net.Conn(late))
	require.Equal(t, net.Conn(late), acceptWithin(t, ls[2]))

	// Close wakes, too.
	got = blocked(t, ls[2])
	asked()
	require.NoError(t, ls[2].Close())
	require.ErrorIs(t, get(t, got).err, net.ErrClosed)
	last := newPipeConn(t)
	hand(t, a.conns, net.Conn(last))
	require.Eventually(t, func() bool { return undelivered(ls[0]) == 1 }, limit(5*time.Second), time.Millisecond)
	require.NoError(t, ls[1].Close())
	require.False(t, last.closed.Load(), "a member is left")
	require.NoError(t, ls[0].Close())
	require.True(t, last.closed.Load())
	_, err := a.Accept()
	require.ErrorIs(t, err, net.ErrClosed, "the last member closes the listener")
}

// TLS and LimitListener behind Dispatch keep what they promise.
func TestDispatchOfTLS(t *testing.T) {
	noLeaks(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	cert := testCertificate(t)
	g, ls := dispatchTest(t, tls.NewListener(tcp, &tls.Config{Certificates: []tls.Certificate{cert}}), 4)
	_, err = ls[0].AcceptTCP()
	require.ErrorIs(t, err, ErrUnsupported)
	_, err = ls[0].File()
	require.ErrorIs(t, err, ErrUnsupported)
	_, err = ls[0].SyscallConn()
	require.ErrorIs(t, err, ErrUnsupported)
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range ls {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	for range 20 {
		c, err := tls.Dial("tcp", g.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		require.NoError(t, err)
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		_, err = io.ReadFull(c, make([]byte, 1))
		require.NoError(t, err)
		c.Close()
	}
	require.NoError(t, g.Close())
	wg.Wait()
	require.EqualValues(t, 20, accepted.Load())
}

// With LimitListener around the dispatched listener nothing is accepted past
// the limit, and what is queued isn't lost.
func TestDispatchOfLimitListener(t *testing.T) {
	noLeaks(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, ls := dispatchTest(t, netutil.LimitListener(tcp, 1), 3)
	queueUp(t, tcp.Addr(), 3)
	first := acceptWithin(t, ls[0])
	two := blocked(t, ls[1])
	time.Sleep(20 * time.Millisecond)
	require.Empty(t, two)
	first.Close()
	require.NoError(t, get(t, two).err)
}

// Dispatch over a listener of ours: the groups nest.
func TestDispatchNests(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, outer := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		g, ls := dispatchTest(t, outer[0], 2)
		outer[1].Close()
		clients := queueUp(t, g.Addr(), 10)
		ls[0].Close()
		for range clients {
			c, err := ls[1].AcceptTCP()
			require.NoError(t, err)
			n := answer(t, c)
			wantAnswer(t, clients[n], n)
			c.Close()
		}
		require.NoError(t, ls[1].Close())
		require.ErrorIs(t, outer[0].Close(), net.ErrClosed)
	})
}

// What the listener returns goes to the Accept that asked, an error like a connection:
// the others ask in their turn, and one that it goes on returning ends them all.
func TestErrorsOfADispatchedListener(t *testing.T) {
	noLeaks(t)
	a := newAcceptor()
	_, ls := dispatchTest(t, a, 3)
	one, two := blocked(t, ls[0]), blocked(t, ls[1])
	passing := &net.OpError{Op: "accept", Err: outOfFiles{}}
	hand(t, a.errs, error(passing))
	var r result
	select {
	case r = <-one:
		one = two
	case r = <-two:
	}
	require.Same(t, passing, r.err, "the error isn't changed")
	time.Sleep(20 * time.Millisecond)
	require.Empty(t, one, "the other one waits on")
	require.EqualValues(t, 1, a.waits.Load(), "it asks in its turn, once")

	three := blocked(t, ls[2])
	hand(t, a.conns, net.Conn(newPipeConn(t)))
	hand(t, a.conns, net.Conn(newPipeConn(t)))
	require.NoError(t, get(t, one).err)
	require.NoError(t, get(t, three).err)

	one, two = blocked(t, ls[0]), blocked(t, ls[1])
	good := errors.New("for good")
	hand(t, a.errs, error(good))
	hand(t, a.errs, error(good))
	require.Equal(t, good, get(t, one).err)
	require.Equal(t, good, get(t, two).err)
}

// After an error that may pass, members that wait already get another try even
// if no Accept asks any more.
func TestRetryAfterPassingError(t *testing.T) {
	noLeaks(t)
	a := newAcceptor()
	_, ls := dispatchTest(t, a, 2)
	one, two := blocked(t, ls[0]), blocked(t, ls[1])
	hand(t, a.errs, error(outOfFiles{}))
	select {
	case <-one:
		one = two
	case <-two:
	}
	hand(t, a.conns, net.Conn(newPipeConn(t)))
	require.NoError(t, get(t, one).err)
}

// An error that may pass, in the very moment in which the leader's own waiting
// ends, must not end anybody else's without a word.
func TestPassingErrorWhileLeaderTimesOut(t *testing.T) {
	noLeaks(t)
	ln := newConns()
	_, ls := dispatchTest(t, ln, 2)
	for range count(300, 20) {
		first, second := blocked(t, ls[0]), blocked(t, ls[1]) // the first leads
		require.NoError(t, ls[0].SetDeadline(longPast))
		failed := false
		select {
		case ln.errs <- outOfFiles{}: // it may be out already
			failed = true
		case <-time.After(time.Millisecond):
		}
		r := get(t, first)
		require.Error(t, r.err)
		require.NoError(t, ls[0].SetDeadline(time.Time{}))
		c := newPipeConn(t)
		if errors.Is(r.err, outOfFiles{}) { // the other one waits on, until an Accept asks again
			again := blocked(t, ls[0])
			hand(t, ln.conns, net.Conn(newPipeConn(t)))
			hand(t, ln.conns, net.Conn(newPipeConn(t)))
			require.NoError(t, get(t, again).err)
			require.NoError(t, get(t, second).err)
			continue
		}
		require.ErrorIs(t, r.err, os.ErrDeadlineExceeded)
		select {
		case r := <-second: // the error was this one's
			require.ErrorIs(t, r.err, outOfFiles{})
			require.True(t, failed)
		case ln.conns <- c:
			require.Equal(t, net.Conn(c), get(t, second).c)
		case <-time.After(limit(5 * time.Second)):
			t.Fatal("the other one is forgotten")
		}
	}
}

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

// sourceOfEach returns, for each of two members, an address whose connections go to
// it: that both find out by accepting from some.
func sourceOfEach(t *testing.T, ln *conns, ls []*Listener) (source [2]string) {
	t.Helper()
	waiting := []<-chan result{blocked(t, ls[0]), blocked(t, ls[1])}
	for i := 0; source[0] == "" || source[1] == ""; i++ {
		require.Less(t, i, 100, "all sources go to one member")
		from := fmt.Sprintf("192.0.2.%d", i)
		hand(t, ln.conns, net.Conn(sourceConn{newPipeConn(t), flow(from, 1)}))
		to := 0
		select {
		case <-waiting[0]:
		case <-waiting[1]:
			to = 1
		}
		source[to] = from
		waiting[to] = blocked(t, ls[to])
	}
	for i, l := range ls {
		require.NoError(t, l.SetDeadline(longPast))
		require.ErrorIs(t, get(t, waiting[i]).err, os.ErrDeadlineExceeded)
		require.NoError(t, l.SetDeadline(time.Time{}))
	}
	return source
}

// With SteerSource a source stays at one member. A connection for a busy member
// is held for it, at most 100 ms and at most 16 of them, and moves on when the
// member closes; the last Close closes what is held.
func TestSteerSource(t *testing.T) {
	noLeaks(t)
	askAll(t)
	ln := newConns()
	_, ls := dispatchTest(t, ln, 2, WithSteering(SteerSource))
	source := sourceOfEach(t, ln, ls)
	port := 0
	from := func(i int) sourceConn {
		port++
		return sourceConn{newPipeConn(t), flow(source[i], port)}
	}

	// Both wait: each gets its own, whoever leads.
	for range 20 {
		a, b := blocked(t, ls[0]), blocked(t, ls[1])
		ca, cb := from(0), from(1)
		hand(t, ln.conns, net.Conn(ca))
		hand(t, ln.conns, net.Conn(cb))
		require.Equal(t, net.Conn(ca), get(t, a).c)
		require.Equal(t, net.Conn(cb), get(t, b).c)
	}
	// One is busy: its connections are held, and it gets them when it asks.
	b := blocked(t, ls[1])
	held := from(0)
	hand(t, ln.conns, net.Conn(held))
	own := from(1)
	hand(t, ln.conns, net.Conn(own))
	require.Equal(t, net.Conn(own), get(t, b).c)
	require.Equal(t, net.Conn(held), acceptWithin(t, ls[0]))

	// It stays busy: the next in rank gets it, not at once and not much later.
	b = blocked(t, ls[1])
	start := time.Now()
	held = from(0)
	hand(t, ln.conns, net.Conn(held))
	require.Equal(t, net.Conn(held), get(t, b).c)
	require.GreaterOrEqual(t, time.Since(start), 90*time.Millisecond)

	// More than 16 aren't held.
	b = blocked(t, ls[1])
	for range 16 {
		hand(t, ln.conns, net.Conn(from(0)))
	}
	past := from(0)
	hand(t, ln.conns, net.Conn(past))
	require.Equal(t, net.Conn(past), get(t, b).c)

	// The busy member closes: what was held for it is the sibling's.
	require.NoError(t, ls[0].Close())
	for range 16 {
		acceptWithin(t, ls[1])
	}
	require.Zero(t, undelivered(ls[1]))
}

// What is held for a member when the last one closes is closed.
func TestHeldConnectionsAreClosedAtLast(t *testing.T) {
	noLeaks(t)
	askAll(t)
	ln := newConns()
	g, ls := dispatchTest(t, ln, 2, WithSteering(SteerSource))
	source := sourceOfEach(t, ln, ls)
	b := blocked(t, ls[1]) // not the one that they are for
	var held []sourceConn
	for port := range 3 {
		c := sourceConn{newPipeConn(t), flow(source[0], port)}
		hand(t, ln.conns, net.Conn(c))
		held = append(held, c)
	}
	require.Eventually(t, func() bool { return undelivered(ls[0]) == 3 }, limit(time.Second), time.Millisecond)
	require.NoError(t, g.Close())
	require.ErrorIs(t, get(t, b).err, net.ErrClosed)
	for _, c := range held {
		require.True(t, c.closed.Load())
	}
}

// With SteerLoad the member that has waited for longest is next.
func TestSteerLoad(t *testing.T) {
	noLeaks(t)
	ln := newConns()
	_, ls := dispatchTest(t, ln, 3, WithSteering(SteerLoad))
	waiting := []<-chan result{blocked(t, ls[0]), blocked(t, ls[1]), blocked(t, ls[2])}
	for i := range 30 {
		c := sourceConn{newPipeConn(t), flow("192.0.2.1", i)}
		hand(t, ln.conns, net.Conn(c))
		require.Equal(t, net.Conn(c), get(t, waiting[i%3]).c)
		waiting[i%3] = blocked(t, ls[i%3])
	}
}

// With one of four loops stalled half of the time, nobody's connections wait for
// it: what the dispatcher hands out goes to a member that waits.
func TestStalledMemberDelaysNobody(t *testing.T) {
	for _, s := range []Steering{SteerFlow, SteerLoad} {
		t.Run(s.String(), func(t *testing.T) {
			noLeaks(t)
			g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", WithDispatcher(), WithSteering(s))
			var wg sync.WaitGroup
			var accepted atomic.Int64
			for _, l := range ls[1:] {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					c, err := ls[0].Accept()
					if err != nil {
						return
					}
					var b [1]byte
					c.Read(b[:])
					c.Write(b[:])
					c.Close()
					time.Sleep(limit(100 * time.Millisecond))
				}
			}()
			var late atomic.Int64
			d := new(load)
			for range count(1000, 100) {
				start := time.Now()
				d.one("tcp", g.Addr().String())
				if time.Since(start) > limit(50*time.Millisecond) {
					late.Add(1)
				}
			}
			d.end(t, false)
			require.NoError(t, g.Close())
			wg.Wait()
			t.Logf("%d of %d waited longer than 50 ms", late.Load(), d.served.Load())
			require.LessOrEqual(t, late.Load(), d.served.Load()/50)
		})
	}
}

// A readyListener accepts at once, without a system call.
type readyListener struct {
	c net.Conn
}

func (l *readyListener) Accept() (net.Conn, error) { return l.c, nil }

func (l *readyListener) Close() error { return nil }

func (l *readyListener) Addr() net.Addr { return l.c.LocalAddr() }

func (l *readyListener) SetDeadline(time.Time) error { return nil }

// BenchmarkDispatchOverhead measures what the dispatcher adds to the Accept of
// the listener under it.
func BenchmarkDispatchOverhead(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	defer ln.Close()
	client := dialTest(b, ln.Addr())
	ready := &readyListener{c: client}
	b.Run("listener", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			ready.Accept()
		}
	})
	for _, n := range []int{1, 4} {
		b.Run(fmt.Sprint(n, " members"), func(b *testing.B) {
			g, err := Dispatch(ready, n)
			require.NoError(b, err)
			defer g.Close()
			l := g.Listeners()[0]
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				l.Accept()
			}
		})
	}
}

// A connection that comes when a deadline has just passed, and the Accept hasn't seen that
// yet, isn't forgotten when the deadline is put off.
func TestDeadlineIsPutOffAtTheLastMoment(t *testing.T) {
	noLeaks(t)
	for _, later := range []time.Time{{}, time.Now().Add(time.Hour)} {
		_, ls := dispatchTest(t, newAcceptor(), 2)
		got := blocked(t, ls[0])
		c := newPipeConn(t)
		comesAfterDeadline(ls[0], c)
		require.Empty(t, got)
		require.NoError(t, ls[0].SetDeadline(later))
		require.Equal(t, net.Conn(c), get(t, got).c)
	}
}
