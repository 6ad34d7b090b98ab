package lblisten

// The soak: members come, go, hold, get deadlines and change places at random
// under load, and a model says what each client may see. soak_unix_test.go does
// the same to processes.
//
// It goes in rounds, each of which has a seed, and the plan of a round, the list
// of its operations with the pauses between them, follows from the seed alone. So
// a seed replays the operations (LBLISTEN_TEST_SEED, which a failure prints); how
// they fall in with the clients, the scheduler and the kernel is not replayed.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lblisten/lblisten/internal/joining"
)

// soakRounds calls round with one seed after the other: for d, or for one of shares
// of LBLISTEN_TEST_SOAK. With LBLISTEN_TEST_SEED that is the first seed, else it is random.
func soakRounds(t *testing.T, d time.Duration, shares int, round func(seed uint64)) {
	if long, err := time.ParseDuration(os.Getenv("LBLISTEN_TEST_SOAK")); err == nil {
		d = long / time.Duration(shares)
	}
	seed, err := strconv.ParseUint(os.Getenv("LBLISTEN_TEST_SEED"), 10, 64)
	if err != nil {
		seed = uint64(rand.Uint32())
	}
	first := seed
	for until := time.Now().Add(d); ; seed++ {
		round(seed)
		if t.Failed() || !time.Now().Before(until) {
			break
		}
	}
	t.Logf("seeds %d to %d", first, seed)
}

// An operation of a soak: what, on which member or process, how much, and how
// long to wait before.
type operation struct {
	do   string
	on   int
	n    int
	wait time.Duration
}

func (o operation) String() string {
	return fmt.Sprintf("%v: %s %d (%d)", o.wait.Round(time.Microsecond), o.do, o.on, o.n)
}

// A history is what a soak has begun to do.
type history struct {
	mu   sync.Mutex
	done []string
}

func (h *history) add(o operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done = append(h.done, o.String())
}

// watch panics, with the history, if f takes too long.
func (h *history) watch(seed uint64, f func()) {
	late := time.AfterFunc(limit(150*time.Second), func() {
		buf := make([]byte, 1<<22)
		panic(fmt.Sprintf("seed %d hangs after\n%s\n%s", seed, h, buf[:runtime.Stack(buf, true)]))
	})
	defer late.Stop()
	f()
}

// String has the last operations.
func (h *history) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.done[max(0, len(h.done)-40):], "\n")
}

// clients dial, say their number and want it back.
type clients struct {
	network, address string
	excuse           func(c *soakClient) *atomic.Int64 // where to count who failed; nil if there is no excuse

	last                 atomic.Uint64 // number
	served, reset, ended atomic.Int64  // ended: refused or reset while nobody listened
	died, lost           atomic.Int64  // died: with its process
	firstErr             atomic.Pointer[error]
	load                 atomic.Int32 // how many dial without end
	running              int          // of them were started; the plan's goroutine has it
	wg                   sync.WaitGroup
}

// A soakClient is one connection, from dial to its end.
type soakClient struct {
	number     uint64
	port       int
	begin, end time.Time
	err        error
}

func (cs *clients) one() {
	c := &soakClient{number: cs.last.Add(1), begin: time.Now()}
	c.err = cs.talk(c)
	c.end = time.Now()
	if c.err == nil {
		cs.served.Add(1)
		return
	}
	if to := cs.excuse(c); to != nil {
		to.Add(1)
		return
	}
	cs.lost.Add(1)
	err := fmt.Errorf("client %d (port %d) after %v: %w", c.number, c.port, c.end.Sub(c.begin), c.err)
	cs.firstErr.CompareAndSwap(nil, &err)
}

func (cs *clients) talk(c *soakClient) error {
	conn, err := dialOnce(cs.network, cs.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		c.port = a.Port
	}
	conn.SetDeadline(time.Now().Add(limit(60 * time.Second)))
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], c.number)
	if _, err := conn.Write(b[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b[:]); got != c.number {
		return fmt.Errorf("the answer is for %d", got)
	}
	return nil
}

// obey does what a plan has clients do; false if that is for others.
func (cs *clients) obey(o operation) bool {
	switch o.do {
	case "burst":
		for range o.n {
			cs.wg.Add(1)
			go func() {
				defer cs.wg.Done()
				cs.one()
			}()
		}
	case "reset": // clients that connect and go, without a word
		for range o.n {
			if c, err := dialOnce(cs.network, cs.address); err == nil {
				c.Close()
				cs.reset.Add(1)
			}
		}
	case "load":
		cs.load.Store(int32(o.n))
		for ; cs.running < o.n; cs.running++ {
			cs.wg.Add(1)
			go func(i int) {
				defer cs.wg.Done()
				for {
					switch n := int(cs.load.Load()); {
					case n < 0:
						return
					case i < n:
						cs.one()
					default:
						time.Sleep(time.Millisecond)
					}
				}
			}(cs.running)
		}
	default:
		return false
	}
	return true
}

// wait ends the load, and waits until every client has got what it gets.
func (cs *clients) wait() {
	cs.load.Store(-1)
	cs.wg.Wait()
	cs.running = 0
	cs.load.Store(0)
}

// totals are those of all rounds.
type totals struct{ operations, served, reset, ended, died, lost int64 }

func (t *totals) add(cs *clients, operations int) {
	t.operations += int64(operations)
	t.served += cs.served.Load()
	t.reset += cs.reset.Load()
	t.ended += cs.ended.Load()
	t.died += cs.died.Load()
	t.lost += cs.lost.Load()
}

func (t *totals) String() string {
	return fmt.Sprintf("%d operations; %d tried, %d lost; %d were reset by their clients, %d ended while nobody listened, %d died with a process",
		t.operations, t.served+t.reset+t.ended+t.died+t.lost, t.lost, t.reset, t.ended, t.died)
}

// echoNumber answers a client: it calls got with its number before that, if it
// has one, and answered after it.
func echoNumber(c net.Conn, got func(n uint64), answered func()) {
	defer c.Close()
	var b [8]byte
	_, err := io.ReadFull(c, b[:])
	if err == nil {
		got(binary.BigEndian.Uint64(b[:]))
		_, err = c.Write(b[:])
	}
	answered()
	if err == nil {
		io.Copy(io.Discard, c)
	}
}

// soakSeats is how many groups of members there are at the most. The first one
// stays until the end of the round.
const soakSeats = 6

// planMembers is the plan of a round in one process. Everything goes on at the
// same time but what is on one seat, and the clients' doings.
func planMembers(r *rand.Rand) (plan []operation) {
	var taken, held, timed [soakSeats]bool
	add := func(do string, on, n int) {
		wait := time.Duration(0)
		if r.IntN(3) == 0 {
			wait = time.Duration(r.IntN(8000)) * time.Microsecond
		}
		plan = append(plan, operation{do, on, n, wait})
	}
	add("join", 0, 1+r.IntN(2))
	taken[0] = true
	add("load", 0, r.IntN(6))
	for range 30 + r.IntN(60) {
		on := r.IntN(soakSeats)
		switch what := r.IntN(16); {
		case what < 1:
			add("load", 0, r.IntN(7))
		case what < 3:
			add("burst", 0, 1+r.IntN(size(40, 5)))
		case what < 4:
			add("reset", 0, 1+r.IntN(5))
		case !taken[on] && r.IntN(2) == 0:
			add("lives", on, size(1+r.IntN(60), 1)) // one after the other
		case !taken[on]:
			add("join", on, 1+r.IntN(3))
			taken[on] = true
		case what < 9 && on != 0:
			if r.IntN(3) == 0 {
				add("close one", on, r.IntN(3))
			} else {
				add("close", on, 0)
				taken[on], held[on], timed[on] = false, false, false
			}
		case what < 11:
			add(map[bool]string{false: "hold", true: "go on"}[held[on]], on, 0)
			held[on] = !held[on]
		case what < 14:
			if timed[on] {
				add("deadline off", on, 0)
			} else {
				add([]string{"deadline past", "deadline soon"}[r.IntN(2)], on, 1+r.IntN(500))
			}
			timed[on] = !timed[on]
		default:
			add("look", on, 0)
		}
	}
	for on := range taken {
		if taken[on] && r.IntN(2) == 0 {
			add("go on", on, 0)
			add("deadline off", on, 0)
		}
	}
	add("end", 0, 0)
	add("begin again", 0, 2)
	return plan
}

// soak is a round of the soak in one process.
type soak struct {
	t        *testing.T
	m        mode
	e        endpoint
	steering Steering
	loops    int                  // of each member; 0: one or two
	nap      time.Duration        // after a deadline
	got      func(c net.Conn)     // takes what Accept returns; nil: it is answered
	passing  func(err error) bool // whether Accept may return it; nil: it may not
	addr     atomic.Pointer[net.Addr]
	clients  clients
	history  history
	accepted atomic.Int64 // by Accept
	counted  atomic.Int64 // by Stats
	lives    atomic.Int64 // of members that came and went at once
	answered sync.Map     // number of a client: how often
	open     sync.WaitGroup

	mu   sync.Mutex
	gaps [][2]time.Time // when nobody listened, for sure or maybe
	errs []error
}

func (s *soak) errorf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, fmt.Errorf(format, args...))
}

func (s *soak) check(err error) {
	if err != nil {
		s.errorf("%w", err)
	}
}

// loop accepts until the member is closed, and judges each result.
func (s *soak) loop(m *soaked) {
	for {
		m.mu.Lock()
		for m.held && !m.done {
			m.cond.Wait()
		}
		version, past, none := m.version, m.past, m.none
		m.mu.Unlock()
		c, err := m.Accept()
		m.mu.Lock()
		same, done := version == m.version && version%2 == 0, m.done
		m.mu.Unlock()
		var op *net.OpError
		switch {
		case err == nil:
			s.accepted.Add(1)
			if same && past {
				s.errorf("Accept returned a connection after the deadline")
			}
			if s.got != nil {
				s.got(c)
				continue
			}
			s.open.Add(1)
			go echoNumber(c, func(n uint64) {
				if _, again := s.answered.LoadOrStore(n, true); again {
					s.errorf("client %d was accepted twice", n)
				}
			}, s.open.Done)
		case s.passing != nil && s.passing(err):
		case !errors.As(err, &op) || op.Op != "accept" || c != nil:
			s.errorf("Accept returned %v, %#v", c, err)
			return
		case errors.Is(err, net.ErrClosed):
			if !done {
				s.errorf("Accept says that the listener is closed, which it isn't")
			}
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			if same && none {
				s.errorf("Accept timed out without a deadline")
			}
			time.Sleep(s.nap)
		default:
			s.errorf("Accept: %w", err)
			return
		}
	}
}

// listen opens n members of the round's address.
func (s *soak) listen(n int) (*Group, error) {
	opts := []Option{s.m.opt, WithSteering(s.steering)}
	return ListenGroup(context.Background(), s.e.network, (*s.addr.Load()).String(), n, opts...)
}

// excuse: a client may fail while nobody listens, and on FreeBSD be turned
// away in the instant in which a socket is opened.
func (s *soak) excuse(c *soakClient) *atomic.Int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, gap := range s.gaps {
		if c.end.After(gap[0]) && (gap[1].IsZero() || c.begin.Before(gap[1])) {
			return &s.clients.ended
		}
	}
	if joining.TurnedAway(c.err) {
		return &s.clients.ended
	}
	return nil
}

// run does a round. At its end the whole group is closed under load while it is
// opened again, and closed for good when all clients are through.
func (s *soak) run(seed uint64, plan []operation) error {
	g, err := ListenGroup(context.Background(), s.e.network, s.e.listen, plan[0].n, s.m.opt, WithSteering(s.steering))
	if errors.Is(err, ErrUnsupported) {
		s.steering = SteerFlow
		g, err = ListenGroup(context.Background(), s.e.network, s.e.listen, plan[0].n, s.m.opt)
	}
	if err != nil {
		return err
	}
	addr := g.Addr()
	s.addr.Store(&addr)
	s.clients.network, s.clients.address = "tcp", s.e.of(addr)
	s.clients.excuse = s.excuse

	var seats [soakSeats]*seat
	var orders [soakSeats]chan operation
	var busy sync.WaitGroup
	for i := range seats {
		seats[i], orders[i] = &seat{s: s}, make(chan operation, len(plan))
		busy.Add(1)
		go func() {
			defer busy.Done()
			for o := range orders[i] {
				seats[i].obey(o)
			}
		}()
	}
	seats[0].join(g)
	end, again := plan[len(plan)-2], plan[len(plan)-1]
	for _, o := range plan[1 : len(plan)-2] {
		time.Sleep(o.wait)
		s.history.add(o)
		if !s.clients.obey(o) {
			orders[o.on] <- o
		}
	}
	for i := range orders {
		close(orders[i])
	}
	busy.Wait()

	// The end, and a new beginning, which may come before the end is one.
	time.Sleep(end.wait)
	s.mu.Lock()
	s.gaps = append(s.gaps, [2]time.Time{time.Now()})
	s.mu.Unlock()
	s.history.add(end)
	for _, st := range seats {
		if st.group != nil {
			busy.Add(1)
			go func() {
				defer busy.Done()
				st.obey(operation{do: "close"})
			}()
		}
	}
	time.Sleep(again.wait)
	s.history.add(again)
	next := &seat{s: s}
	next.obey(operation{do: "join", n: again.n})
	s.mu.Lock()
	s.gaps[len(s.gaps)-1][1] = time.Now()
	s.mu.Unlock()
	busy.Wait()
	s.clients.obey(operation{do: "burst", n: 5})
	s.clients.wait()
	next.obey(operation{do: "close"})
	s.open.Wait()

	if n := s.clients.lost.Load(); n > 0 {
		s.errorf("%d clients are lost, the first: %w", n, *s.clients.firstErr.Load())
	}
	if a, c := s.accepted.Load(), s.counted.Load(); a != c {
		s.errorf("%d connections were accepted, Stats say %d", a, c)
	}
	if a, c := s.accepted.Load(), s.clients.served.Load(); a < c {
		s.errorf("%d connections were accepted, %d served", a, c)
	}
	if left := openAddresses(); left != 0 {
		s.errorf("%d addresses are left", left)
	}
	return errors.Join(s.errs...)
}

// A seat has a group of members, or none. Only its own goroutine uses it.
type seat struct {
	s       *soak
	group   *Group
	members []*soaked
	loops   sync.WaitGroup
}

// A soaked is a member with what the model knows of it.
type soaked struct {
	*Listener
	closed bool

	mu   sync.Mutex
	cond sync.Cond // held has changed
	held bool
	done bool
	// version counts the changes of the deadline, it is odd while one is made;
	// past and none say what it is in between.
	version    uint64
	past, none bool
}

func newSoaked(l *Listener) *soaked {
	m := &soaked{Listener: l, none: true}
	m.cond.L = &m.mu
	return m
}

func (m *soaked) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	m.cond.Broadcast()
}

// setDeadline sets a deadline and tells the model.
func (m *soaked) setDeadline(t time.Time, past, none bool) error {
	m.change(func() { m.version++ })
	err := m.SetDeadline(t)
	m.change(func() { m.version, m.past, m.none = m.version+1, past, none })
	return err
}

func (st *seat) join(g *Group) {
	st.group = g
	for _, l := range g.Listeners() {
		m := newSoaked(l)
		st.members = append(st.members, m)
		for range max(st.s.loops, 1+len(g.members)%2) {
			st.loops.Add(1)
			go func() {
				defer st.loops.Done()
				st.s.loop(m)
			}()
		}
	}
}

func (st *seat) close(members []*soaked, end func() error) {
	some := false
	for _, m := range members {
		some = some || !m.closed
		m.closed = true
		m.change(func() { m.done = true })
	}
	err := end()
	if some && err != nil || !some && !errors.Is(err, net.ErrClosed) {
		st.s.errorf("Close returned %v", err)
	}
}

func (st *seat) obey(o operation) {
	s := st.s
	switch o.do {
	case "join":
		g, err := s.listen(o.n)
		if err != nil {
			s.errorf("Listen: %w", err)
			return
		}
		st.join(g)
		return
	case "lives":
		for i := range o.n {
			st.obey(operation{do: "join", n: 1 + i%2})
			if i%4 == 0 {
				st.obey(operation{do: "deadline soon", n: 1 + i*7})
				st.obey(operation{do: "deadline off"})
			}
			st.obey(operation{do: "close"})
			s.lives.Add(1)
		}
		return
	}
	if st.group == nil {
		return // Listen failed
	}
	switch o.do {
	case "close":
		st.close(st.members, st.group.Close)
		st.loops.Wait()
		s.counted.Add(int64(st.group.Stats().Accepted))
		st.group, st.members = nil, nil
	case "close one":
		m := st.members[o.n%len(st.members)]
		st.close([]*soaked{m}, m.Close)
	case "look":
		st.group.Info()
		stats := st.group.Stats()
		if stats.Inherited > stats.Accepted {
			s.errorf("%+v", stats)
		}
		for _, m := range st.members {
			m.Info()
			m.Stats()
		}
	default:
		for _, m := range st.members {
			var err error
			switch {
			case m.closed:
			case o.do == "hold":
				m.change(func() { m.held = true })
			case o.do == "go on":
				m.change(func() { m.held = false })
			case o.do == "deadline past":
				err = m.setDeadline(longPast, true, false)
			case o.do == "deadline soon":
				err = m.setDeadline(time.Now().Add(time.Duration(o.n)*time.Microsecond), false, false)
			case o.do == "deadline off":
				err = m.setDeadline(time.Time{}, false, true)
			}
			if err != nil {
				s.errorf("%s: %w", o.do, err)
			}
		}
	}
}

// Members come, go, stand still, and have deadlines, in any order and at the same
// time, with every steering there is: each client is served, or came when nobody
// listened; each Accept returns what its contract says; each connection comes out
// of one Accept; nobody is overlooked, although what would help in the end (a
// second look after retryAfter) is switched off.
func TestSoak(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip(resetOnWindows)
	}
	inModes(t, func(t *testing.T, m mode) {
		var usable []endpoint
		for _, e := range []endpoint{endpoints[0], endpoints[2]} {
			if ln, err := Listen(e.network, e.listen, m.opt); err == nil {
				require.NoError(t, ln.Close())
				usable = append(usable, e)
			}
		}
		steerings := []Steering{SteerFlow, SteerSource, SteerLoad}
		if m.name == "kernel" {
			steerings = append(steerings, SteerCPU)
		}
		var sum totals
		steered := make(map[Steering]int)
		lives := int64(0)
		soakRounds(t, period(2*time.Second), 1, func(seed uint64) {
			r := rand.New(rand.NewPCG(seed, 0))
			s := &soak{t: t, nap: 100 * time.Microsecond, m: m, e: usable[r.IntN(len(usable))], steering: steerings[r.IntN(len(steerings))]}
			plan := planMembers(r)
			var err error
			s.history.watch(seed, func() { err = s.run(seed, plan) })
			steered[s.steering]++
			lives += s.lives.Load()
			sum.add(&s.clients, len(plan))
			if err != nil {
				t.Errorf("seed %d (%s, steering by %v): %v\nafter\n%s", seed, s.e.name, s.steering, err, &s.history)
			}
		})
		t.Logf("%v; %d members came and went at once; rounds by steering: %v", &sum, lives, steered)
	})
}
