package lbprometheus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// noLeaks fails the test if it leaves a goroutine or a descriptor.
func noLeaks(t *testing.T) {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	descriptors := func() int {
		open, _ := os.ReadDir("/dev/fd") // none where there is no such directory
		return len(open)
	}
	before := descriptors()
	t.Cleanup(func() {
		if t.Failed() {
			return // whatever went wrong first is what to look at
		}
		goleak.VerifyNone(t, ignore)
		require.Eventually(t, func() bool { return descriptors() <= before }, limit(5*time.Second), 5*time.Millisecond, "%d descriptors were open before", before)
	})
}

// slow is what it is in the tests of package lblisten.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || f < 1 {
		return 1
	}
	return f
}()

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// open opens a group, or skips the test where the kernel can't balance.
func open(t *testing.T, n int, network, address string, opts ...lblisten.Option) *lblisten.Group {
	t.Helper()
	g, err := lblisten.ListenGroup(context.Background(), network, address, n, opts...)
	if errors.Is(err, lblisten.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	return g
}

func inModes(t *testing.T, f func(t *testing.T, opt lblisten.Option)) {
	for name, opt := range map[string]lblisten.Option{"kernel": lblisten.WithRequireKernel(), "dispatcher": lblisten.WithDispatcher()} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			f(t, opt)
		})
	}
}

// dial connects n clients, which are closed when the test ends.
func dial(t *testing.T, a net.Addr, n int) {
	t.Helper()
	for range n {
		c, err := net.DialTimeout(a.Network(), a.String(), limit(10*time.Second))
		require.NoError(t, err)
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		t.Cleanup(func() { c.Close() })
	}
}

// accept accepts n connections of l.
func accept(t *testing.T, l *lblisten.Listener, n int) {
	t.Helper()
	require.NoError(t, l.SetDeadline(time.Now().Add(limit(10*time.Second))))
	for range n {
		c, err := l.Accept()
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
	}
}

// serve accepts until l is closed, and counts.
func serve(t *testing.T, l *lblisten.Listener, n *atomic.Int64) {
	for {
		c, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			return
		}
		n.Add(1)
		c.Close()
	}
}

// register registers a collector, lints what it gives, and returns a func that
// scrapes by HTTP: the value of each series, by its name and the labels but address.
func register(t *testing.T, src Source) (scrape func() map[string]float64) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	c := NewCollector(src)
	require.NoError(t, reg.Register(c))
	srv := httptest.NewServer(promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError}))
	t.Cleanup(srv.Close)
	t.Cleanup(srv.Client().CloseIdleConnections)
	address := fmt.Sprintf("address=%q", src.Addr())
	return func() map[string]float64 {
		t.Helper()
		problems, err := testutil.CollectAndLint(c)
		require.NoError(t, err)
		require.Empty(t, problems)
		problems, err = testutil.GatherAndLint(reg)
		require.NoError(t, err)
		require.Empty(t, problems)
		return parse(t, get(t, srv), address)
	}
}

func get(t *testing.T, srv *httptest.Server) string {
	t.Helper()
	resp, err := srv.Client().Get(srv.URL)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s", body)
	return string(body)
}

// parse reads the text format; every line must have the label address.
func parse(t *testing.T, body, address string) map[string]float64 {
	t.Helper()
	series := make(map[string]float64)
	for _, line := range strings.Split(strings.TrimSpace(body), "\n") {
		if strings.HasPrefix(line, "#") {
			continue
		}
		require.Contains(t, line, address)
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		require.NoError(t, err)
		name := strings.NewReplacer("{"+address+"}", "", address+",", "").Replace(line[:i])
		series[strings.TrimPrefix(name, "lblisten_")] = v
	}
	return series
}

// Queued connections are told while they are queued, and what was accepted is counted for the
// listener that accepted it.
func TestCollector(t *testing.T) {
	const backlog, clients = 7, 5
	inModes(t, func(t *testing.T, opt lblisten.Option) {
		g := open(t, 2, "tcp4", "127.0.0.1:0", opt, lblisten.WithBacklog(backlog))
		scrape := register(t, g)
		info := g.Info()
		told := fmt.Sprintf("listener_info{balancer=%q,on_close=%q,on_kill=%q,steering=%q}", info.Balancer, info.OnClose, info.OnKill, info.Steering)
		want := map[string]float64{
			`accepted_total{listener="0"}`: 0, `inherited_total{listener="0"}`: 0,
			`accepted_total{listener="1"}`: 0, `inherited_total{listener="1"}`: 0,
			"members": 2, "sockets": float64(info.Sockets), told: 1,
		}
		setQueues := func() {
			if g.Stats().Backlog < 0 {
				return // this system doesn't tell
			}
			if info.Balancer == lblisten.BalancerDispatcher {
				want[`backlog{listener="shared"}`] = backlog
				want[`queue_length{listener="shared"}`] = float64(g.Stats().Queued)
				return
			}
			for i, l := range g.Listeners() {
				want[fmt.Sprintf(`backlog{listener="%d"}`, i)] = backlog
				want[fmt.Sprintf(`queue_length{listener="%d"}`, i)] = float64(l.Stats().Queued)
			}
		}
		setQueues()
		require.Equal(t, want, scrape())

		dial(t, g.Addr(), clients)
		waiting := func() int { return g.Stats().Queued }
		if waiting() >= 0 {
			require.Eventually(t, func() bool { return waiting() == clients }, limit(10*time.Second), time.Millisecond)
		}
		setQueues()
		require.Equal(t, want, scrape())

		var wg sync.WaitGroup
		accepted := make([]atomic.Int64, 2)
		for i, l := range g.Listeners() {
			wg.Add(1)
			go func() { defer wg.Done(); serve(t, l, &accepted[i]) }()
		}
		require.Eventually(t, func() bool { return accepted[0].Load()+accepted[1].Load() == clients }, limit(10*time.Second), time.Millisecond)
		for i := range accepted {
			want[fmt.Sprintf(`accepted_total{listener="%d"}`, i)] = float64(accepted[i].Load())
		}
		setQueues()
		require.Equal(t, want, scrape())
		require.NoError(t, g.Close())
		wg.Wait()
	})
}

// drained is a group whose queues were emptied after its listeners were asked.
type drained struct{ *lblisten.Group }

func (d drained) Stats() lblisten.Stats {
	s := d.Group.Stats()
	s.Queued = 0
	return s
}

// The queue of a closed listener is told as a shared one until it is empty, and
// who accepts from it is told to inherit.
func TestInherited(t *testing.T) {
	noLeaks(t)
	const clients = 16
	g := open(t, 2, "tcp4", "127.0.0.1:0", lblisten.WithRequireKernel())
	scrape := register(t, g)
	first, heir := g.Listeners()[0], g.Listeners()[1]
	dial(t, g.Addr(), clients)
	var left int // in the queue of the first
	if g.Stats().Queued >= 0 {
		require.Eventually(t, func() bool { return g.Stats().Queued == clients }, limit(10*time.Second), time.Millisecond)
		left = first.Stats().Queued
	}
	require.NoError(t, first.Close())
	s := scrape()
	require.Equal(t, 1., s["members"])
	if g.Stats().Queued >= 0 {
		require.Equal(t, float64(left), s[`queue_length{listener="shared"}`])
		require.NotContains(t, s, `queue_length{listener="0"}`)
		require.Equal(t, float64(clients-left), s[`queue_length{listener="1"}`])
		require.Zero(t, register(t, drained{g})()[`queue_length{listener="shared"}`])
	}
	accept(t, heir, clients)
	s = scrape()
	require.Equal(t, float64(clients), s[`accepted_total{listener="1"}`])
	require.Equal(t, float64(heir.Stats().Inherited), s[`inherited_total{listener="1"}`])
	if g.Stats().Queued >= 0 {
		require.Equal(t, float64(left), s[`inherited_total{listener="1"}`])
	}
	require.Zero(t, s[`accepted_total{listener="0"}`])
}

// A listener that was opened alone has the label "0".
func TestListener(t *testing.T) {
	inModes(t, func(t *testing.T, opt lblisten.Option) {
		g := open(t, 1, "tcp4", "127.0.0.1:0", opt)
		l := g.Listeners()[0]
		scrape := register(t, l)
		require.Equal(t, register(t, g)(), scrape())
		dial(t, l.Addr(), 3)
		accept(t, l, 3)
		require.Equal(t, 3., scrape()[`accepted_total{listener="0"}`])
	})
}

// Where the system doesn't tell how long the queue is, nothing is told.
func TestQueueIsLeftOut(t *testing.T) {
	noLeaks(t)
	g := open(t, 2, "unix", filepath.Join(t.TempDir(), "s"), lblisten.WithLB())
	if g.Stats().Backlog >= 0 {
		t.Skip("this system tells the queue of unix sockets")
	}
	scrape := register(t, g)
	dial(t, g.Addr(), 1)
	accept(t, g.Listeners()[1], 1)
	s := scrape()
	require.Equal(t, 1., s[`accepted_total{listener="1"}`])
	require.Len(t, s, 7, "%v", s)
	for name := range s {
		require.NotContains(t, name, "queue")
		require.NotContains(t, name, "backlog")
	}
}

// fixed is a source that says the same always.
type fixed struct {
	addr  net.Addr
	info  lblisten.Info
	stats lblisten.Stats
}

func (f fixed) Addr() net.Addr        { return f.addr }
func (f fixed) Info() lblisten.Info   { return f.info }
func (f fixed) Stats() lblisten.Stats { return f.stats }

// What one machine can't show.
func TestSources(t *testing.T) {
	noLeaks(t)
	unix := &net.UnixAddr{Name: "/run/\xff", Net: "unix"} // no UTF-8, which a label must be
	info := lblisten.Info{Balancer: lblisten.BalancerDispatcher, Steering: lblisten.SteerLoad, Members: 1, Sockets: 1,
		OnClose: lblisten.InheritProcess | lblisten.InheritHandoff, OnKill: lblisten.InheritHandoff}
	const told = `listener_info{balancer="dispatcher",on_close="process+handoff",on_kill="handoff",steering="load"}`
	for _, c := range []struct {
		stats lblisten.Stats
		want  map[string]float64
	}{
		{lblisten.Stats{Accepted: 9, Inherited: 4, Queued: -1, Backlog: -1}, nil},
		{lblisten.Stats{Accepted: 9, Inherited: 4, Queued: 0, Backlog: 4096},
			map[string]float64{`queue_length{listener="shared"}`: 0, `backlog{listener="shared"}`: 4096}},
	} {
		want := map[string]float64{`accepted_total{listener="0"}`: 9, `inherited_total{listener="0"}`: 4, "members": 1, "sockets": 1, told: 1}
		for name, v := range c.want {
			want[name] = v
		}
		reg := prometheus.NewPedanticRegistry()
		require.NoError(t, reg.Register(NewCollector(fixed{unix, info, c.stats})))
		srv := httptest.NewServer(promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
		require.Equal(t, want, parse(t, get(t, srv), "address=\"/run/\uFFFD\""))
		srv.Client().CloseIdleConnections()
		srv.Close()
	}
}

// A registry takes any number of groups, and each address once; both may be had
// under a label that tells them apart.
func TestSeveralGroups(t *testing.T) {
	noLeaks(t)
	a := open(t, 2, "tcp4", "127.0.0.1:0", lblisten.WithLB())
	b := open(t, 1, "tcp4", "127.0.0.1:0", lblisten.WithDispatcher())
	joined, err := lblisten.Listen("tcp4", a.Addr().String(), lblisten.WithLB())
	require.NoError(t, err)
	defer joined.Close()

	reg := prometheus.NewPedanticRegistry()
	first := NewCollector(a)
	require.NoError(t, reg.Register(first))
	require.NoError(t, reg.Register(NewCollector(b)))
	for _, again := range []Source{a, a.Listeners()[1], joined.(Source)} {
		var already prometheus.AlreadyRegisteredError
		require.ErrorAs(t, reg.Register(NewCollector(again)), &already)
		require.Equal(t, first, already.ExistingCollector)
	}
	n, err := testutil.GatherAndCount(reg, "lblisten_members")
	require.NoError(t, err)
	require.Equal(t, 2, n)

	apart := prometheus.NewPedanticRegistry()
	for role, src := range map[string]Source{"group": a, "joined": joined.(Source)} {
		require.NoError(t, prometheus.WrapRegistererWith(prometheus.Labels{"role": role}, apart).Register(NewCollector(src)))
	}
	n, err = testutil.GatherAndCount(apart, "lblisten_accepted_total")
	require.NoError(t, err)
	require.Equal(t, 3, n)
}

// The counters of a closed group stay; what is no more in force is left out. A
// new group on the address takes the place in the registry.
func TestClosed(t *testing.T) {
	inModes(t, func(t *testing.T, opt lblisten.Option) {
		g := open(t, 2, "tcp4", "127.0.0.1:0", opt)
		dial(t, g.Addr(), 1)
		require.NoError(t, g.Listeners()[0].Close()) // the kernel may have chosen it
		accept(t, g.Listeners()[1], 1)
		require.NoError(t, g.Close())
		want := map[string]float64{
			`accepted_total{listener="0"}`: 0, `inherited_total{listener="0"}`: 0,
			`accepted_total{listener="1"}`: 1, `inherited_total{listener="1"}`: float64(g.Stats().Inherited),
			"members": 0, "sockets": 0,
		}
		require.Equal(t, want, register(t, g)())

		reg := prometheus.NewPedanticRegistry()
		old := NewCollector(g)
		require.NoError(t, reg.Register(old))
		next := NewCollector(open(t, 3, "tcp4", g.Addr().String(), opt))
		require.Error(t, reg.Register(next))
		require.True(t, reg.Unregister(old))
		require.NoError(t, reg.Register(next))
		n, err := testutil.GatherAndCount(reg, "lblisten_accepted_total")
		require.NoError(t, err)
		require.Equal(t, 3, n)
	})
}

// Scrapes go on while clients connect, and listeners join and close; no counter
// ever falls, and in the end they tell what was accepted.
func TestCollectWhileClosing(t *testing.T) {
	inModes(t, func(t *testing.T, opt lblisten.Option) {
		g := open(t, 8, "tcp4", "127.0.0.1:0", opt)
		scrape := register(t, g)
		extra := open(t, 1, "tcp4", g.Addr().String(), opt) // keeps the address until the clients are done

		var wg, clients sync.WaitGroup
		var accepted, byExtra atomic.Int64
		wg.Add(1)
		go func() { defer wg.Done(); serve(t, extra.Listeners()[0], &byExtra) }()
		for _, l := range g.Listeners() {
			wg.Add(1)
			go func() { defer wg.Done(); serve(t, l, &accepted) }()
		}
		var dialled atomic.Int64
		stop := make(chan struct{})
		for range 4 {
			clients.Add(1)
			go func() {
				defer clients.Done()
				for {
					select {
					case <-stop:
						return
					default:
					}
					c, err := net.DialTimeout("tcp4", g.Addr().String(), limit(10*time.Second))
					if err != nil {
						t.Error(err)
						return
					}
					c.SetDeadline(time.Now().Add(limit(10 * time.Second)))
					if _, err := io.Copy(io.Discard, c); err != nil { // until it is accepted and closed
						t.Error(err)
					}
					c.(*net.TCPConn).SetLinger(0)
					c.Close()
					dialled.Add(1)
				}
			}()
		}
		last := map[string]float64{}
		look := func() float64 {
			now, sum := scrape(), 0.
			for name, v := range last {
				if strings.Contains(name, "_total") {
					require.GreaterOrEqual(t, now[name], v, name)
				}
			}
			for name, v := range now {
				require.GreaterOrEqual(t, v, 0., name)
				if strings.HasPrefix(name, "accepted_total") {
					sum += v
				}
			}
			last = now
			return sum
		}
		for i, l := range g.Listeners() {
			least := dialled.Load() + 20
			for deadline := time.Now().Add(limit(20 * time.Second)); dialled.Load() < least; {
				require.True(t, time.Now().Before(deadline), "no connection is served any more")
				look()
			}
			closing := make(chan error)
			go func() { closing <- l.Close() }()
			look()
			require.NoError(t, <-closing)
			if i%2 == 0 { // its socket is adopted
				joined := open(t, 1, "tcp4", g.Addr().String(), opt)
				look()
				require.NoError(t, joined.Close())
			}
		}
		close(stop)
		clients.Wait()
		require.NoError(t, extra.Close())
		wg.Wait()
		sum := look()
		require.Equal(t, float64(accepted.Load()), sum)
		require.Equal(t, dialled.Load(), accepted.Load()+byExtra.Load())
		require.NotContains(t, last, `queue_length{listener="shared"}`)
		require.Zero(t, last["members"])
		t.Logf("%d connections, %d of them accepted by the group and %d by one that joined", dialled.Load(), accepted.Load(), byExtra.Load())
	})
}
