package lblisten

// The dispatcher: members without sockets of their own take turns at accepting
// from the one that they share.

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The dispatcher: members without sockets of their own. Their Accepts take
// turns at accepting from the one shared listener (leader and followers). An
// Accept first stands in line as a waiter of its member; if nobody leads, it
// leads. The leader accepts, and gives each connection to the member whose turn
// it is, of those that have a waiter, which is always itself if nobody else
// waits; when that is itself, it leaves, and a waiter becomes the leader. So
// nothing is accepted that nobody waits for.
//
// A waiter is either in its member's line, or exactly one message is on its way
// to it: who takes it out of the line, under the member's lock, sends one.
type dispatcher struct {
	g         *group
	ln        net.Listener
	deadliner interface{ SetDeadline(time.Time) error } // ln, if its Accept can be woken
	isTCP     bool                                      // it accepts *net.TCPConn
	pooled    *pooled                                   // its place in the handoff's pool, if this process made it
	restore   func(*net.TCPConn)                        // what its connections need, nil if nothing

	leading atomic.Bool   // somebody has the lead, or it is being passed on
	leader  *waiter       // of a leader that stands alone; belongs to who leads
	seq     atomic.Uint64 // orders waiters, for SteerLoad
	holding atomic.Int32  // connections in all Listener.held
	loose   atomic.Int32  // len(free)

	wakeMu sync.Mutex   // held over ln's SetDeadline
	woken  atomic.Bool  // ln has, or is about to get, a past deadline, which the leader takes back
	isNets bool         // ln's SetDeadline is known not to block
	failed atomic.Value // of a struct{ error }: ln ended for good

	mu     sync.Mutex
	free   []net.Conn  // in hand, for whoever asks next; guarded by mu
	retry  *time.Timer // offers the lead to a waiter after a passing error; guarded by mu
	closed bool        // guarded by mu
}

// A waiter is an Accept that waits for the dispatcher.
type waiter struct {
	message chan message // holds one
	leads   bool         // it is in the listener's Accept; guarded by its member's mu
	since   uint64       // orders it by how long it has waited, see dispatcher.seq; never 0
}

// A message ends the waiting: a connection, an error, or the lead.
type message struct {
	c    net.Conn
	err  error
	lead bool
	rest bool // err is a passing one of the listener, which is left alone for now
}

var waiters = sync.Pool{New: func() any { return &waiter{message: make(chan message, 1)} }}

// A heldConn waits for a busy member, with SteerSource.
type heldConn struct {
	c     net.Conn
	key   uint64
	timer *time.Timer
}

const (
	holdTime = 100 * time.Millisecond
	holdMost = 16
)

// open opens the dispatcher's socket. With a handoff it is the one of all
// processes: whoever is first makes it.
func (d *dispatcher) open(ctx context.Context, cfg *config) error {
	const patience = time.Second // for who is making it at this moment
	g := d.g
	for begin := time.Now(); ; {
		if g.h != nil && !g.at.isNew() {
			ln, err := g.h.find(g)
			if err != nil {
				return err
			}
			if ln != nil {
				d.restore = restoreKeepAlive(g.lc)
				d.use(ln)
				return nil
			}
		}
		err := d.openSocket(ctx, cfg)
		if err == nil || g.h == nil || !isAddrInUse(err) || time.Since(begin) >= patience {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *dispatcher) openSocket(ctx context.Context, cfg *config) error {
	lc, setKeepAlive := lean(cfg.lc)
	lc.SetMultipathTCP(false)
	lc.Control = chainControl(lc.Control, func(network, _ string, c syscall.RawConn) (err error) {
		if network == "tcp4" || network == "tcp6" {
			err = c.Control(setKeepAlive)
		}
		if err == nil && d.g.h != nil {
			d.pooled, err = d.g.h.deposit(ctx, c, d.g, d.g.at)
		}
		return err
	})
	ln, err := lc.Listen(ctx, d.g.network, d.g.ask)
	if err != nil {
		if d.pooled != nil {
			d.g.h.withdraw(d.pooled)
		}
		return err
	}
	d.use(ln)
	return nil
}

// dispatchGroup makes a group of n members on top of ln.
func dispatchGroup(ln net.Listener, n int, cfg *config) (*group, []*Listener) {
	g := newGroup(place{}, ln.Addr().Network(), errors.New("Dispatch was asked for"), cfg)
	g.refs = n
	g.addr = ln.Addr()
	g.d.use(ln)
	close(g.opened)
	members, _ := g.add(context.Background(), n, cfg, nil) // only opening sockets can fail
	return g, members
}

func (d *dispatcher) use(ln net.Listener) {
	d.ln = ln
	if dl, ok := ln.(interface{ SetDeadline(time.Time) error }); ok && dl.SetDeadline(time.Time{}) == nil {
		d.deadliner = dl
	}
	switch ln := ln.(type) { // not by method: a wrapper may hand out connections of its own
	case *net.TCPListener:
		d.isTCP, d.isNets = true, true
	case *net.UnixListener:
		d.isNets = true
	case *Listener:
		d.isTCP = ln.ln != nil || ln.g.d.isTCP
		d.isNets = ln.ln != nil || ln.g.d.isNets
	}
}

func (d *dispatcher) conns() []syscall.RawConn {
	if sc, ok := d.ln.(syscall.Conn); ok {
		if c, err := sc.SyscallConn(); err == nil {
			return []syscall.RawConn{c}
		}
	}
	return nil
}

// acceptDispatched is Accept of a dispatcher's member.
func (l *Listener) acceptDispatched() (net.Conn, error) {
	l.state.Add(1)
	c, err := l.g.d.accept(l)
	l.leave()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	if d := l.g.d; d.restore != nil && d.isTCP {
		d.restore(c.(*net.TCPConn))
	}
	return c, nil
}

func (d *dispatcher) accept(l *Listener) (net.Conn, error) {
	var w *waiter
	leads := false
	for {
		m, inLine := message{}, false
		leads = leads || d.leading.CompareAndSwap(false, true)
		if leads && l.standAlone() {
			d.drop(w)
			w, inLine = d.leader, true
		} else {
			w, m, inLine = l.line(w, leads && d.deadliner != nil)
		}
		if inLine {
			if d.loose.Load() > 0 {
				d.giveFree()
			}
			leads = leads || d.leading.CompareAndSwap(false, true) // who led may have seen nobody in line
			switch {
			case !leads:
				m = <-w.message
			case d.deadliner == nil:
				go d.pump()
				leads = false
				m = <-w.message
			default:
				m = d.lead(l, w)
			}
		}
		if m.lead {
			leads = true
			continue
		}
		d.drop(w)
		switch {
		case leads && m.rest:
			d.rest()
		case leads:
			d.passLead()
		}
		return m.c, m.err
	}
}

// drop ends the use of a waiter that is out of line, with no message on its way.
func (d *dispatcher) drop(w *waiter) {
	if w != nil && w != d.leader {
		waiters.Put(w)
	}
}

// leaderOnly in Listener.since stands for a line of one: the dispatcher's
// leader, which isn't in waiters. It is what most Accepts of a busy server are,
// and takes no lock.
const leaderOnly = 1<<64 - 1

// standAlone puts the leader in the member's line, if nobody is there, and there
// is nothing to look after but connections. Whoever else needs to know the line
// makes an ordinary one of it first, by admit.
func (l *Listener) standAlone() bool {
	d := l.g.d
	if d.deadliner == nil || l.g.steering != SteerFlow || l.mayEnd() || !l.since.CompareAndSwap(0, leaderOnly) {
		return false
	}
	// Before, because from here on somebody may admit it to give it a connection; and
	// again, because who ends the waiting sets why and then admits it.
	return !l.mayEnd() || !l.leaveAlone()
}

// mayEnd tells whether there is something but a connection that ends the waiting.
func (l *Listener) mayEnd() bool {
	return l.state.Load()&closedMark != 0 || l.timed.Load() || l.g.d.failed.Load() != nil
}

// leaveAlone takes a leader that stands alone out of the line. It returns false
// if it doesn't, any more.
func (l *Listener) leaveAlone() bool { return l.since.CompareAndSwap(leaderOnly, 0) }

// admit puts a leader that stands alone in waiters. It is called under l.mu,
// before waiters is used.
func (l *Listener) admit() {
	if l.since.CompareAndSwap(leaderOnly, 1) {
		l.waiters = append(l.waiters, l.g.d.leader)
	}
}

// line puts a waiter in the member's line, or returns the message that makes
// waiting needless. Who was in line before goes to its head again; nil was not.
func (l *Listener) line(w *waiter, leads bool) (_ *waiter, m message, inLine bool) {
	d := l.g.d
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.state.Load()&closedMark != 0:
		return w, message{err: l.opError("accept", net.ErrClosed)}, false
	case l.expired():
		return w, message{err: l.opError("accept", os.ErrDeadlineExceeded)}, false
	case len(l.held) > 0:
		return w, message{c: l.unhold(0).c}, false
	}
	if failed := d.failed.Load(); failed != nil {
		return w, message{err: failed.(struct{ error }).error}, false
	}
	again := w != nil
	if !again {
		w = waiters.Get().(*waiter)
		w.since = 1
		if l.g.steering == SteerLoad {
			w.since = d.seq.Add(1)
		}
	}
	w.leads = leads
	for !l.since.CompareAndSwap(0, w.since) && len(l.waiters) == 0 {
		l.admit()
	}
	at := len(l.waiters)
	if again {
		at = 0
	}
	l.waiters = slices.Insert(l.waiters, at, w)
	l.since.Store(l.waiters[0].since)
	return w, message{}, true
}

// unline takes waiter i out of the line. It is called under l.mu, by who then
// sends the waiter a message, or is its leader.
func (l *Listener) unline(i int) *waiter {
	w := l.waiters[i]
	if len(l.waiters) == 1 {
		l.waiters[0] = nil
		l.waiters = l.waiters[:0]
		l.since.Store(0)
		return w
	}
	l.waiters = slices.Delete(l.waiters, i, i+1)
	l.since.Store(l.waiters[0].since)
	return w
}

// end ends the waiting of waiter i with m. It is called under l.mu.
func (l *Listener) end(i int, m message) {
	w := l.unline(i)
	leads := w.leads // once it has the message, it may be another Accept's
	w.message <- m
	if leads {
		l.g.d.wake()
	}
}

// out takes a leader's own waiter out of line. It returns false if somebody else
// did, and has sent it a message.
func (l *Listener) out(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admit()
	i := slices.Index(l.waiters, w)
	if i >= 0 {
		l.unline(i)
	}
	return i >= 0
}

// send gives m to a waiter of the member; to w itself, which is then true, if
// w is the first choice and still in line. It returns false if nobody waits.
func (l *Listener) send(m message, w *waiter) (sent, own bool) {
	if w != nil && w == l.g.d.leader && l.leaveAlone() {
		return true, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admit()
	if len(l.waiters) == 0 {
		return false, false
	}
	if i := slices.Index(l.waiters, w); i >= 0 {
		l.unline(i)
		return true, true
	}
	// The leader can do it too, but has to be woken.
	i := max(0, slices.IndexFunc(l.waiters, func(w *waiter) bool { return !w.leads }))
	l.end(i, m)
	return true, false
}

// wakeAll ends every waiting of the member with err. It is called under l.mu.
func (l *Listener) wakeAll(err error) {
	l.admit()
	for len(l.waiters) > 0 {
		l.end(0, message{err: err})
	}
}

// setTimer makes a deadline end the waiting. It is called under l.mu.
func (l *Listener) setTimer(t time.Time) {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	switch in := time.Until(t); {
	case t.IsZero():
	case in <= 0:
		l.wakeAll(l.opError("accept", os.ErrDeadlineExceeded))
	default:
		l.timer = time.AfterFunc(in, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			switch {
			case l.expired():
				l.wakeAll(l.opError("accept", os.ErrDeadlineExceeded))
			case !l.deadline.IsZero():
				l.setTimer(l.deadline) // it was put off, or the clock was set back
			}
		})
	}
}

// lead accepts until the waiting of w, which is in line, is over.
func (d *dispatcher) lead(l *Listener, w *waiter) message {
	if !w.leads { // only this goroutine writes it, after it stood in line
		l.mu.Lock()
		w.leads = true
		l.mu.Unlock()
	}
	for {
		select {
		case m := <-w.message:
			return m
		default:
		}
		c, err := d.ln.Accept()
		switch {
		case err == nil:
			switch sent, own := d.route(c, l, w); {
			case own:
				return message{c: c}
			case !sent:
				// Nobody waits, so w is out of line too. What ended its waiting
				// comes second to a connection, unless it is one.
				m := <-w.message
				if m.c == nil {
					return message{c: c}
				}
				d.putFree(c)
				return m
			}
		case d.rested(err):
		case isPassing(err):
			if l.out(w) {
				return message{err: err, rest: true}
			}
		default:
			d.fail(err)
		}
	}
}

// pump leads for waiters where the listener's Accept can't be interrupted. It
// ends when nobody waits.
func (d *dispatcher) pump() {
	for d.anyWaits() {
		c, err := d.ln.Accept()
		switch {
		case err == nil:
			if sent, _ := d.route(c, nil, nil); !sent {
				d.putFree(c)
			}
		case isPassing(err):
			d.sendAny(message{err: err})
			d.rest()
			return
		default:
			d.fail(err)
			return
		}
	}
	d.passLead()
}

// passLead is called by who has the lead, to give it to a waiter, if there is
// one.
func (d *dispatcher) passLead() {
	for {
		d.leading.Store(false)
		if !d.anyWaits() || !d.leading.CompareAndSwap(false, true) {
			return // whoever stands in line later, looks for a leader after that
		}
		switch {
		case d.deadliner == nil:
			go d.pump()
			return
		case d.sendAny(message{lead: true}):
			return
		}
	}
}

// rest gives up the lead after an error that may pass. The next Accept that
// asks leads; those that wait already wait on, for retryAfter at most.
func (d *dispatcher) rest() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leading.Store(false)
	if d.retry == nil && !d.closed {
		d.retry = time.AfterFunc(d.g.retryAfter, func() {
			d.mu.Lock()
			d.retry = nil
			d.mu.Unlock()
			if d.anyWaits() && d.leading.CompareAndSwap(false, true) {
				d.passLead()
			}
		})
	}
}

// wake ends the leader's Accept, which then looks for its message. The leader
// takes the deadline back (rested): would anybody else, it might not wake. It is
// called under a member's mu.
func (d *dispatcher) wake() {
	d.woken.Store(true)
	if d.isNets {
		d.setPast()
	} else {
		go d.setPast() // who knows what it waits for
	}
}

func (d *dispatcher) setPast() {
	d.wakeMu.Lock()
	defer d.wakeMu.Unlock()
	if d.woken.Load() {
		d.deadliner.SetDeadline(longAgo)
	}
}

// rested tells whether an error is that of a wake-up, and takes the deadline
// back.
func (d *dispatcher) rested(err error) bool {
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		return false
	}
	d.wakeMu.Lock()
	defer d.wakeMu.Unlock()
	woken := d.woken.Swap(false)
	if woken {
		d.deadliner.SetDeadline(time.Time{})
	}
	return woken
}

// fail ends all members' waiting, now and later: the listener is no more.
func (d *dispatcher) fail(err error) {
	d.failed.Store(struct{ error }{err})
	for _, l := range *d.g.members.Load() {
		l.mu.Lock()
		l.wakeAll(err)
		l.mu.Unlock()
	}
}

func (d *dispatcher) anyWaits() bool {
	for _, l := range *d.g.members.Load() {
		if l.since.Load() != 0 {
			return true
		}
	}
	return false
}

// sendAny gives m to any waiter, and returns false if there is none.
func (d *dispatcher) sendAny(m message) bool {
	members := *d.g.members.Load()
	turn := int(d.g.turn.Add(1) % maxMembers)
	for i := range members {
		l := members[(turn+i)%len(members)]
		if l.since.Load() == 0 {
			continue
		}
		if sent, _ := l.send(m, nil); sent {
			return true
		}
	}
	return false
}

// route gives a connection to the waiting member whose turn it is, or holds it
// for the one that steering by source wants. When that is l, and its waiter w is
// in line, own is true. Nothing is sent if nobody waits.
func (d *dispatcher) route(c net.Conn, l *Listener, w *waiter) (sent, own bool) {
	if l != nil && d.g.steering != SteerSource && d.waitsAlone(l) {
		if sent, own := l.send(message{c: c}, w); sent {
			return sent, own
		}
	}
	key := d.key(c)
	if d.g.steering == SteerSource && d.hold(c, key) {
		return true, false
	}
	return d.give(c, key, l, w)
}

// waitsAlone tells whether no other member waits, so that there is no choice.
func (d *dispatcher) waitsAlone(l *Listener) bool {
	for _, other := range *d.g.members.Load() {
		if other != l && other.since.Load() != 0 {
			return false
		}
	}
	return true
}

func (d *dispatcher) key(c net.Conn) uint64 {
	switch d.g.steering {
	case SteerSource:
		return sourceKey(c)
	case SteerLoad:
		return 0
	}
	return flowKey(c)
}

// give is route without holding.
func (d *dispatcher) give(c net.Conn, key uint64, l *Listener, w *waiter) (sent, own bool) {
	for {
		members := *d.g.members.Load()
		var first int
		if d.g.steering == SteerLoad {
			first = longestWaiting(members)
		} else {
			first = firstInRank(key, len(members),
				func(i int) uint64 { return members[i].id },
				func(i int) bool { return members[i].since.Load() != 0 })
		}
		if first < 0 {
			return false, false
		}
		m := message{c: c}
		if members[first] != l {
			sent, _ = members[first].send(m, nil)
		} else {
			sent, own = l.send(m, w)
		}
		if sent {
			return sent, own
		}
	}
}

func longestWaiting(members []*Listener) int {
	first, longest := -1, uint64(0)
	for i, l := range members {
		if since := l.since.Load(); since != 0 && (first < 0 || since < longest) {
			first, longest = i, since
		}
	}
	return first
}

// hold keeps a connection for the member that is first in rank for it, if that
// is busy, and not too many are kept already.
func (d *dispatcher) hold(c net.Conn, key uint64) bool {
	members := *d.g.members.Load()
	first := firstInRank(key, len(members), func(i int) uint64 { return members[i].id }, func(int) bool { return true })
	if first < 0 {
		return false
	}
	l := members[first]
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiters) > 0 || l.state.Load()&closedMark != 0 {
		return false
	}
	if d.holding.Add(1) > holdMost {
		d.holding.Add(-1)
		return false
	}
	h := &heldConn{c: c, key: key}
	h.timer = time.AfterFunc(holdTime, func() {
		l.mu.Lock()
		i := slices.Index(l.held, h)
		if i >= 0 {
			l.unhold(i)
		}
		l.mu.Unlock()
		if i >= 0 {
			d.settle(h)
		}
	})
	l.held = append(l.held, h)
	return true
}

// unhold takes a held connection from the member. It is called under l.mu.
func (l *Listener) unhold(i int) *heldConn {
	h := l.held[i]
	l.held = slices.Delete(l.held, i, i+1)
	h.timer.Stop()
	l.g.d.holding.Add(-1)
	return h
}

// settle gives a connection that was held to the next in rank.
func (d *dispatcher) settle(h *heldConn) {
	if sent, _ := d.give(h.c, h.key, nil, nil); !sent {
		d.putFree(h.c)
	}
}

// moveHeld settles what was held for a closed member.
func (d *dispatcher) moveHeld(l *Listener) {
	for {
		l.mu.Lock()
		if len(l.held) == 0 {
			l.mu.Unlock()
			return
		}
		h := l.unhold(0)
		l.mu.Unlock()
		d.settle(h)
	}
}

// putFree keeps a connection for whoever asks next, and closes it if nobody can.
func (d *dispatcher) putFree(c net.Conn) {
	d.mu.Lock()
	closed := d.closed
	if !closed {
		d.free = append(d.free, c)
		d.loose.Add(1)
	}
	d.mu.Unlock()
	if closed {
		c.Close()
		return
	}
	if d.anyWaits() {
		d.giveFree()
	}
}

// giveFree gives the free connections to waiters.
func (d *dispatcher) giveFree() {
	for {
		d.mu.Lock()
		if len(d.free) == 0 {
			d.mu.Unlock()
			return
		}
		c := d.free[0]
		d.free = d.free[1:]
		d.loose.Add(-1)
		d.mu.Unlock()
		if sent, _ := d.give(c, d.key(c), nil, nil); !sent {
			d.putFree(c)
			return
		}
	}
}

// shutdown closes the listener, and what nobody can take any more. The file of a
// unix socket stays if others accept from it.
func (d *dispatcher) shutdown(others bool) error {
	d.mu.Lock()
	d.closed = true
	free := d.free
	d.free = nil
	if d.retry != nil {
		d.retry.Stop()
	}
	d.mu.Unlock()
	for _, c := range free {
		c.Close()
	}
	if d.ln == nil {
		return nil // it was never opened
	}
	if u, ok := d.ln.(interface{ SetUnlinkOnClose(bool) }); ok && d.g.h != nil {
		u.SetUnlinkOnClose(!others)
	}
	return d.ln.Close()
}
