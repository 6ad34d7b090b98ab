package lblisten

// Hunts for lost wake-ups: members close, join and time out while a few connections
// arrive, and then nothing happens any more that could help: nobody looks again by a
// clock. Each connection must come out of an Accept that was in progress.

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// huntRounds is how many rounds a hunt has: LBLISTEN_TEST_HUNT, or some.
func huntRounds() int {
	if n, err := strconv.Atoi(os.Getenv("LBLISTEN_TEST_HUNT")); err == nil {
		return n
	}
	return count(600, 60)
}

// A hunter counts what a hunt has tried.
type hunter struct {
	t       *testing.T
	r       *rand.Rand
	network string
	address []string // one of them at random
	results chan result

	closes, tried, timeouts, closed int
	inherited                       uint64
	slowest                         time.Duration
}

// accept starts an Accept, some moments later.
func (h *hunter) accept(l *Listener) {
	yields := h.r.IntN(30)
	go func() {
		spin(yields)
		c, err := l.Accept()
		h.results <- result{c, err}
	}()
}

func spin(n int) {
	for range n {
		runtime.Gosched()
	}
}

// round has a few connections arrive while one more member comes and goes. Members
// that stay have as many Accepts each as there are connections; nobody calls
// Accept again.
func (h *hunter) round(stay []*Listener, goes *Listener) {
	t, r := h.t, h.r
	n := 1 + r.IntN(3)*r.IntN(3)
	running := 0
	for _, l := range stay {
		for range n {
			h.accept(l)
			running++
		}
	}
	for range r.IntN(3) {
		h.accept(goes)
		running++
	}
	clients := make(chan net.Conn, n)
	var others sync.WaitGroup
	begin := time.Now()
	for range n {
		yields, address := r.IntN(40), h.address[r.IntN(len(h.address))]
		others.Add(1)
		go func() {
			defer others.Done()
			spin(yields)
			c, err := dialOnce(h.network, address)
			if err != nil {
				t.Error(err)
				return
			}
			clients <- c
		}()
	}
	if r.IntN(3) == 0 { // a deadline that is put off all the time, and never passes
		l, times := stay[r.IntN(len(stay))], r.IntN(20)
		others.Add(1)
		go func() {
			defer others.Done()
			for range times {
				l.SetDeadline(time.Now().Add(time.Hour))
				runtime.Gosched()
			}
		}()
	}
	if r.IntN(2) == 0 {
		others.Wait() // it closes in the instant in which it is woken
		spin(r.IntN(4))
	} else {
		spin(r.IntN(40))
	}
	require.NoError(t, goes.Close())
	h.closes++
	others.Wait()
	for got := 0; got < n; running-- {
		select {
		case r := <-h.results:
			switch {
			case r.err == nil:
				got++
				r.c.Close()
			case errors.Is(r.err, net.ErrClosed):
				h.closed++
			default:
				t.Fatal(r.err)
			}
		case <-time.After(limit(20 * time.Second)):
			buf := make([]byte, 1<<20)
			t.Fatalf("round %d: %d of %d came out\n%s", h.closes, got, n, buf[:runtime.Stack(buf, true)])
		}
	}
	h.slowest = max(h.slowest, time.Since(begin))
	h.tried += n
	for _, l := range stay {
		l.SetDeadline(longPast)
	}
	for ; running > 0; running-- {
		if r := <-h.results; errors.Is(r.err, os.ErrDeadlineExceeded) {
			h.timeouts++
		} else {
			require.ErrorIs(t, r.err, net.ErrClosed)
		}
	}
	for _, l := range stay {
		l.SetDeadline(time.Time{})
	}
	for range n {
		(<-clients).Close()
	}
}

func newHunter(t *testing.T, a net.Addr) *hunter {
	seed := rand.Uint64()
	if n, err := strconv.ParseUint(os.Getenv("LBLISTEN_TEST_SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("seed %d", seed)
	return &hunter{t: t, r: rand.New(rand.NewPCG(seed, 8)), network: a.Network(), address: []string{a.String()}, results: make(chan result, 100)}
}

func (h *hunter) report(stay []*Listener) {
	for _, l := range stay {
		h.inherited += l.Stats().Inherited
	}
	h.t.Logf("%d closes, %d tried, 0 lost, %d of them inherited; %d timed out, %d closed; the slowest round took %v",
		h.closes, h.tried, h.inherited, h.timeouts, h.closed, h.slowest)
}

// Where the kernel balances: each member that goes leaves a shared socket with
// connections in it, and one is shared all the time. Now and then the next one adopts.
func TestHuntInherited(t *testing.T) {
	modes[0].need(t)
	defer set(&retryAfter, time.Hour)()
	for _, stable := range []int{1, 2} {
		t.Run(fmt.Sprint(stable), func(t *testing.T) {
			noLeaks(t)
			g, ls := newTestGroup(t, stable+1, "tcp", "127.0.0.1:0", WithRequireKernel())
			require.NoError(t, ls[stable].Close())
			dontLookAgain(g)
			h := newHunter(t, g.Addr())
			for range huntRounds() {
				if h.r.IntN(4) == 0 {
					h.round(ls[:stable], joinTest(t, ls[0], WithRequireKernel()))
				} else {
					h.round(ls[:stable], joinWithNewSocket(t, ls[0]))
				}
				dropShared(t, g, 1)
			}
			h.report(ls[:stable])
		})
	}
}

// By the dispatcher, whose Accept can be interrupted or not.
func TestHuntDispatched(t *testing.T) {
	defer set(&retryAfter, time.Hour)()
	for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
		for _, hidden := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, no SetDeadline %v", s, hidden), func(t *testing.T) {
				noLeaks(t)
				tcp := listenTCP(t)
				var ln net.Listener = tcp
				if hidden {
					ln = withoutDeadline{tcp}
				}
				g, ls := dispatchTest(t, ln, 3, WithSteering(s))
				h := newHunter(t, tcp.Addr())
				for range huntRounds() / 3 {
					h.round(ls[:2], ls[2])
					ls[2] = oneMore(g)
				}
				h.report(ls[:2])
			})
		}
	}
}

// By the dispatcher, with a unix socket that is bound anew all the time, so that some
// connections come from shared sockets.
func TestHuntBoundAnew(t *testing.T) {
	if !hasUnixSockets(t) {
		t.Skip("no unix sockets")
	}
	if runtime.GOOS == "windows" {
		t.Skip("the file of a socket that is open can't be removed")
	}
	defer set(&retryAfter, time.Hour)()
	noLeaks(t)
	path := socketPath(t)
	open := func() *Listener {
		l, err := Listen("unix", path, WithLB())
		require.NoError(t, err)
		return l.(*Listener)
	}
	stay := []*Listener{open(), open()}
	h := newHunter(t, stay[0].Addr())
	for range huntRounds() / 3 {
		if h.r.IntN(2) == 0 { // to where clients still find it
			require.NoError(t, os.Rename(path, path+".old"))
			h.address = []string{path, path + ".old"}
		}
		h.round(stay, open())
	}
	h.report(stay)
	require.NotZero(t, h.inherited)
	for _, l := range stay {
		require.NoError(t, l.Close())
	}
}
