package lblisten

// A follower: a member of the dispatcher, as its user calls it. How its Accepts take
// turns is in dispatch.go.

import (
	"net"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
)

// A follower is a member without a socket of its own. d.mu guards it.
type follower struct {
	d        *dispatcher
	id       uint64      // for rendezvous hashing
	inside   int         // Accepts in progress: each leads, sleeps, or is about to look or to leave
	wakeUp   sync.Cond   // where they sleep
	asleep   int         // how many do
	given    []arrival   // to sleepers that were woken and have not run yet: never more than asleep
	since    uint64      // orders members by how long they have waited for a connection
	deadline time.Time   // the user's
	timer    *time.Timer // of deadline
	closed   bool
	idle     chan struct{} // closed when the member is closed and no Accept is in progress; then nil
}

func (f *follower) accept() (net.Conn, bool, error) {
	r := f.d.accept(f)
	switch {
	case r.odd != nil && r.odd.panicked == nil:
		runtime.Goexit()
	case r.odd != nil:
		panic(r.odd.panicked)
	case r.err != nil:
		return nil, false, r.err
	case r.finish != nil:
		r.finish(r.c)
	}
	return r.c, r.from != nil && r.from.isInherited(), nil
}

// join makes a member.
func (d *dispatcher) join() *follower {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastID++
	f := &follower{d: d, id: d.lastID, idle: make(chan struct{})}
	f.wakeUp.L = &d.mu
	d.members = append(d.members, f)
	return f
}

func (f *follower) setDeadline(t time.Time) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	f.deadline = t
	f.d.setTimerLocked(f)
	return nil
}

// setTimerLocked has a member's Accepts look when its deadline passes, and now, if
// something is in hand: it may have come when the deadline had passed and the Accept
// hadn't seen that yet.
func (d *dispatcher) setTimerLocked(f *follower) {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	if len(d.hand) > 0 {
		d.lookAgainLocked(f)
	}
	switch in := time.Until(f.deadline); {
	case f.closed || f.deadline.IsZero():
	case in <= 0:
		d.lookAgainLocked(f)
	default: // the deadline may be put off, or the clock set back
		f.timer = time.AfterFunc(in, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.setTimerLocked(f)
		})
	}
}

func (f *follower) close() <-chan struct{} {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	d.members = slices.DeleteFunc(d.members, func(x *follower) bool { return x == f })
	d.setTimerLocked(f)
	d.lookAgainLocked(f)
	idle := f.idle
	f.tellIdleLocked()
	return idle
}

func (f *follower) isClosed() bool {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.closed
}

// waiting returns the number of Accepts that lead or sleep.
func (f *follower) waiting() int {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n := f.asleep - len(f.given)
	if f.d.leader == f {
		n++
	}
	return n
}

func (f *follower) conns() []syscall.RawConn        { return f.d.conns() }
func (f *follower) listener() (net.Listener, error) { return f.d.source().ln, nil }

// leaveBehind makes what was held for the member anybody's: but not of those that close
// together with it.
func (f *follower) leaveBehind() []*watch {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		i := slices.IndexFunc(d.hand, func(h *inHand) bool { return h.of == f })
		if i < 0 {
			return nil
		}
		d.passLocked(d.takeLocked(i).arrival)
	}
}

// expiredLocked tells whether the user's deadline has passed.
func (f *follower) expiredLocked() bool {
	return !f.deadline.IsZero() && !time.Now().Before(f.deadline)
}

// tellIdleLocked ends what Close waits for, if it is time.
func (f *follower) tellIdleLocked() {
	if f.closed && f.inside == 0 && f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
}

// wake has an Accept of the member look what is ready. It returns false if none is
// in progress. One that neither sleeps nor leads looks, or offers on as it leaves.
func (f *follower) wake() bool {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.looks++
	switch {
	case f.inside == 0:
		return false
	case f.asleep > len(f.given):
		f.wakeUp.Signal()
	case f.d.leader == f:
		f.d.interruptLocked()
	}
	return true
}
