package lblisten

// The dispatcher: members without sockets of their own take turns at accepting from
// the one socket, or other listener, that they share. Who is chosen is in choose.go.
//
// It is a monitor: one mutex guards all of it, and a wake-up means "look again". An
// Accept looks whether there is something for it: its member is closed, its
// deadline has passed, a connection is in hand, a shared socket is ready. If there
// is not, and nobody leads, it leads: it calls the listener's Accept, without the
// mutex. Otherwise it sleeps. The leader gives what it has accepted to the member
// whose turn it is, of those that wait, which is its own if no other does. So
// nothing is accepted that nobody waits for.
//
// While somebody sleeps, somebody leads, or one that slept is about to look:
// whoever leaves while nobody leads wakes a sleeper, and whoever is woken leads,
// or leaves, or finds another one leading.

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// A dispatcher shares a listener among the members of an address.
type dispatcher struct {
	a     *address
	isTCP bool // it accepts *net.TCPConn

	mu      sync.Mutex  // guards what follows and all followers; never held over a call of a listener, or into code of the user
	from    *source     // what it accepts from now
	in      *source     // whose Accept whoever leads has called; nil if nobody has
	out     sync.Cond   // told when in becomes nil
	members []*follower // those that aren't closed
	led     bool        // somebody leads
	leader  *follower   // the member whose Accept that is; nil if it is the pump
	asleep  int         // how many Accepts sleep, of all members, and were given nothing
	looks   uint64      // counts the calls of wake: an Accept that looks without the mutex sees so that it must again
	hand    []*inHand   // accepted, and nobody's yet
	held    int         // how many of these are held for a busy member
	shared  bool        // the last connection came from a shared socket
	lastID  uint64      // of a follower
	seq     uint64      // the last follower.since
	opaque  string      // a type of connection that can't be asked for its addresses, of those that came
	closed  bool

	wakeMu sync.Mutex // held over SetDeadline of sources, which may block if they are foreign; comes last
}

// An arrival is what an Accept may return: a connection, an error, or a panic or
// Goexit of a listener that the pump called. The zero one is nothing.
type arrival struct {
	c      net.Conn
	err    error
	odd    *oddity
	finish func(net.Conn) // what c needs, nil for nothing
	from   *watch         // the shared socket that c came from; nil for the source
}

func (r arrival) isNothing() bool { return r.c == nil && r.err == nil && r.odd == nil }

// An oddity is how a listener's Accept has ended without returning.
type oddity struct{ panicked any } // nil: it called runtime.Goexit

// An inHand came when nobody waited any more, or is held for a busy member, with
// SteerSource.
type inHand struct {
	arrival
	of    *follower   // who alone may take it; nil: anybody
	timer *time.Timer // until then; nil if of is
}

// errNothing is temporary for whoever asks, because the next Accept may do better.
type errNothing struct{}

func (errNothing) Error() string   { return "the listener returned neither a connection nor an error" }
func (errNothing) Temporary() bool { return true }
func (errNothing) Timeout() bool   { return false }

func (d *dispatcher) accept(f *follower) (r arrival) {
	d.mu.Lock()
	if f.inside == len(f.given) { // nobody of it waits
		d.servedLocked(f)
	}
	f.inside++
	defer func() { d.leave(f, r) }()
	for r.isNothing() {
		r = d.stepLocked(f)
	}
	return r
}

// leave counts an Accept out, however it ended, sees to it that somebody leads, and
// has another one look for what is ready, in its place. It unlocks mu.
func (d *dispatcher) leave(f *follower, r arrival) {
	f.inside--
	f.tellIdleLocked()
	if !d.led && d.asleep > 0 {
		d.callLocked()
	}
	d.mu.Unlock()
	if r.err != nil && r.from != nil {
		d.a.offerLater()
	} else {
		d.a.offerReady()
	}
}

// stepLocked is one look of an Accept, and what it does if there is nothing: it
// leads or sleeps. It returns nothing if the Accept has to look again.
func (d *dispatcher) stepLocked(f *follower) arrival {
	if r := d.forNowLocked(f); !r.isNothing() {
		return r
	}
	ownTurn := false
	if d.a.ready.Load() != 0 {
		if ownTurn = d.hasOwnTurnLocked(); !ownTurn {
			looks := d.looks
			if r := d.takeSharedLocked(); !r.isNothing() || d.looks != looks {
				return r
			}
			if r := d.forNowLocked(f); !r.isNothing() {
				return r // it came while the mutex was free
			}
		}
	}
	switch {
	case d.led:
		return d.sleepLocked(f)
	case d.from.deadliner == nil:
		d.led = true
		go d.pump()
		return d.sleepLocked(f)
	}
	return d.leadLocked(f, ownTurn)
}

// forNowLocked is what an Accept gets without waiting, but from shared sockets.
func (d *dispatcher) forNowLocked(f *follower) arrival {
	switch {
	case f.closed:
		return arrival{err: d.a.opError("accept", net.ErrClosed)}
	case f.expiredLocked():
		return arrival{err: d.a.opError("accept", os.ErrDeadlineExceeded)}
	}
	for i, h := range d.hand {
		if h.of == nil || h.of == f {
			return d.takeLocked(i).arrival
		}
	}
	return arrival{}
}

// hasOwnTurnLocked tells whether the source has the next turn: if the last
// connection was a shared one, and it has one too, and nobody waits for that.
func (d *dispatcher) hasOwnTurnLocked() bool {
	turn := d.shared && !d.led && d.from.s != nil && d.from.s.readable()
	d.shared = false
	return turn
}

// takeSharedLocked accepts from a shared socket, without the mutex.
func (d *dispatcher) takeSharedLocked() (r arrival) {
	d.mu.Unlock()
	c, w, err := d.a.takeShared()
	d.mu.Lock()
	if c == nil && err == nil {
		return r
	}
	d.shared = true
	return arrival{c: c, err: err, finish: w.finish, from: w}
}

// leadLocked accepts once from the source. It returns nothing if that was for
// another member, or a wake-up. What was seen in its queue, of which it is the turn,
// may be gone: so that turn is a short one.
func (d *dispatcher) leadLocked(f *follower, turn bool) arrival {
	d.led, d.leader = true, f
	defer func() { d.led, d.leader = false, nil }()
	if turn {
		d.wakeMu.Lock()
		d.from.woken = true
		d.from.deadliner.SetDeadline(time.Now().Add(takeTimeout)) // of package net: it doesn't block
		d.wakeMu.Unlock()
	}
	r := d.acceptOneLocked()
	if r.c != nil && (d.holdLocked(r) || d.giveLocked(r)) {
		return arrival{}
	}
	return r // although its own waiting may have ended meanwhile: nobody else waits
}

// pump leads where the listener's Accept can't be woken, while somebody waits. If
// that panics or exits the goroutine, an Accept does so in its place.
func (d *dispatcher) pump() {
	d.mu.Lock()
	returned := false
	defer func() {
		odd := oddity{recover()}
		if !returned {
			d.passLocked(arrival{odd: &odd})
		}
		d.led = !returned && d.asleep > 0
		if d.led {
			go d.pump()
		}
		d.mu.Unlock()
	}()
	for d.asleep > 0 {
		switch r := d.acceptOneLocked(); {
		case d.closed && r.c != nil: // too late for anybody
			d.mu.Unlock()
			r.c.Close()
			d.mu.Lock()
		case !d.holdLocked(r):
			d.passLocked(r)
		}
	}
	returned = true
}

// acceptOneLocked calls the source's Accept, without the mutex. It returns nothing
// after a wake-up.
func (d *dispatcher) acceptOneLocked() (r arrival) {
	from := d.from
	d.in = from
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.in = nil
		d.out.Broadcast()
	}()
	r.c, r.err = from.ln.Accept()
	switch {
	case r.err == nil && r.c == nil:
		r.err = d.a.opError("accept", errNothing{})
	case r.err == nil:
		r.finish = from.finish
	case d.tookBack(from, r.err):
		return arrival{}
	default:
		r.c = nil
	}
	return r
}

// sleepLocked waits until somebody wakes the Accept: with something for it, or to look.
func (d *dispatcher) sleepLocked(f *follower) (r arrival) {
	f.asleep++
	d.asleep++
	f.wakeUp.Wait()
	f.asleep--
	if len(f.given) == 0 {
		d.asleep--
		return arrival{}
	}
	r = f.given[0]
	f.given = slices.Delete(f.given, 0, 1)
	return r
}

// callLocked has a sleeper look.
func (d *dispatcher) callLocked() {
	for i := range d.members {
		if f := d.members[(int(d.seq)+i)%len(d.members)]; f.asleep > len(f.given) {
			f.wakeUp.Signal()
			return
		}
	}
}

// lookAgainLocked has all Accepts of a member look.
func (d *dispatcher) lookAgainLocked(f *follower) {
	f.wakeUp.Broadcast()
	if d.leader == f {
		d.interruptLocked()
	}
}

// interruptLocked ends the leader's Accept, if it has called one. Only the leader takes the deadline back:
// anyone else could undo the wake-up before it is seen. SetDeadline of a foreign
// listener may block, so it has a goroutine and a lock of its own.
func (d *dispatcher) interruptLocked() {
	from := d.in
	if from == nil {
		return // it is about to look
	}
	go func() {
		d.wakeMu.Lock()
		defer d.wakeMu.Unlock()
		defer func() { recover() }() // one that panics wakes nobody, as one that does nothing
		from.woken = true
		from.deadliner.SetDeadline(longAgo)
	}()
}

// tookBack tells whether an error is that of a wake-up, and takes the deadline
// back, before anybody looks what the wake-up was for.
func (d *dispatcher) tookBack(from *source, err error) bool {
	var ne net.Error
	if from.deadliner == nil || !errors.As(err, &ne) || !ne.Timeout() {
		return false
	}
	d.wakeMu.Lock()
	defer d.wakeMu.Unlock()
	woken := from.woken
	if woken {
		from.woken = false
		from.deadliner.SetDeadline(time.Time{})
	}
	return woken
}
