package lblisten

// Accept from a socket of one's own, where the kernel balances. What is shared it
// takes by way of inherit.go.

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/cpu"
)

// An owner is a member with a socket of its own, in which its Accepts wait. Whoever
// wakes them, by a deadline in the past, means "look again": they put the user's
// deadline back, and look whether the member is closed and what is ready.
type owner struct {
	a         *address
	s         *socket
	tcp       *net.TCPListener // that of s
	finish    func(net.Conn)   // what the connections of s need, nil for nothing
	companion *watch           // of its IPv6 socket, where a dual-stack member has two: a shared one from birth
	idle      chan struct{}    // closed when the member is closed and no Accept is in progress
	idleOnce  sync.Once
	ownTurn   atomic.Bool // the last connection was a shared one

	mu       sync.Mutex // held over each SetDeadline of s, which doesn't block; a leaf
	deadline time.Time  // the user's; guarded by mu

	_      cpu.CacheLinePad
	inside atomic.Int64 // Accepts in progress, and the closedMark
	_      cpu.CacheLinePad
}

// closedMark makes owner.inside negative.
const closedMark = -1 << 63

// longAgo is a deadline that ends a blocked Accept at once.
var longAgo = time.Unix(1, 0)

func newOwner(a *address, w *watch) *owner {
	return &owner{a: a, s: w.s, tcp: w.s.ln.(*net.TCPListener), finish: w.finish, idle: make(chan struct{})}
}

func (o *owner) accept() (net.Conn, bool, error) {
	var (
		c   net.Conn
		w   *watch // that it came from; nil: from its own socket
		err error
	)
	o.inside.Add(1)
	for again := true; again; {
		if c, w, err = o.look(); c == nil && err == nil {
			c, err = o.acceptOwn()
		}
		again = err != nil && errors.Is(err, os.ErrDeadlineExceeded) && o.goOn()
	}
	o.leave()
	if err != nil && w != nil {
		o.a.offerLater()
	} else {
		o.a.offerReady()
	}
	if err != nil {
		if op, ok := err.(*net.OpError); ok && o.companion != nil {
			err = o.a.opError(op.Op, op.Err) // one of two sockets, with an address of its own
		}
		return nil, false, err
	}
	inherited, finish := false, o.finish
	if w != nil {
		inherited, finish = w.isInherited(), w.finish
	}
	if finish != nil {
		finish(c)
	}
	return c, inherited, nil
}

func (o *owner) acceptOwn() (net.Conn, error) {
	c, err := o.tcp.AcceptTCP()
	if err != nil {
		return nil, err // a nil *net.TCPConn isn't a nil net.Conn
	}
	return c, nil
}

// look is what an Accept gets without waiting: nothing, if there is nothing.
func (o *owner) look() (net.Conn, *watch, error) {
	switch {
	case o.isClosed():
		return nil, nil, o.a.opError("accept", net.ErrClosed)
	case o.a.ready.Load() != 0 && !o.hasOwnTurn():
		c, w, err := o.a.takeShared()
		if c != nil || err != nil {
			o.ownTurn.Store(true)
		}
		return c, w, err
	}
	return nil, nil, nil
}

// hasOwnTurn tells whether its own socket has the next turn: if the last connection
// was a shared one, and it has one too; or if the user's deadline has passed, which
// the socket then says. Somebody else may take away what it has, so the turn is a
// short one.
func (o *owner) hasOwnTurn() bool {
	turn := o.ownTurn.Swap(false) && o.s.readable()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isClosed() || o.expiredLocked() {
		return true
	}
	if turn {
		soon := time.Now().Add(takeTimeout)
		if !o.deadline.IsZero() && o.deadline.Before(soon) {
			soon = o.deadline
		}
		o.s.ln.SetDeadline(soon)
	}
	return turn
}

// goOn tells whether a time-out was a wake-up. If so it puts the user's deadline
// back, before anybody looks what it was for. That of a closed member stays.
func (o *owner) goOn() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.isClosed():
	case o.expiredLocked():
		return false
	default:
		o.s.ln.SetDeadline(o.deadline)
	}
	return true
}

// leave counts an Accept out. Another one has to look in its place then: this one
// may be the one that was woken.
func (o *owner) leave() {
	if o.inside.Add(-1) == closedMark {
		o.idleOnce.Do(func() { close(o.idle) })
	}
}

// wake has the Accepts look. It returns false if none is in progress.
func (o *owner) wake() bool {
	if o.inside.Load() <= 0 {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.inside.Load() <= 0 {
		return false
	}
	o.s.ln.SetDeadline(longAgo)
	return true
}

// lookAgain is wake, for the once-a-second look.
func (o *owner) lookAgain() { o.wake() }

// expiredLocked tells whether the user's deadline has passed.
func (o *owner) expiredLocked() bool { return !o.deadline.IsZero() && !time.Now().Before(o.deadline) }

func (o *owner) setDeadline(t time.Time) error {
	o.mu.Lock()
	if o.isClosed() {
		o.mu.Unlock()
		return net.ErrClosed // as net's: the only error that isn't a *net.OpError
	}
	o.deadline = t
	err := o.s.ln.SetDeadline(t)
	o.mu.Unlock()
	o.a.offerReady() // an Accept that was woken just before may have slept on
	return err
}

func (o *owner) close() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isClosed() {
		return nil
	}
	if o.inside.Add(closedMark) == closedMark {
		o.idleOnce.Do(func() { close(o.idle) })
	}
	o.s.ln.SetDeadline(longAgo)
	return o.idle
}

func (o *owner) isClosed() bool { return o.inside.Load() < 0 }

// waiting returns the number of Accepts in progress.
func (o *owner) waiting() int { return int(o.inside.Load() &^ closedMark) }

// leaveBehind returns what a closed member leaves: its sockets, for siblings.
func (o *owner) leaveBehind() []*watch {
	if o.companion != nil {
		o.companion.of.Store(nil) // it is shared already
	}
	return []*watch{newWatch(o.a, o.s, o.finish)}
}

// sockets returns those of an owner.
func (o *owner) sockets() []*socket {
	if o.companion == nil {
		return []*socket{o.s}
	}
	return []*socket{o.s, o.companion.s}
}

func (o *owner) conns() (conns []syscall.RawConn) {
	for _, s := range o.sockets() {
		conns = append(conns, s.conn)
	}
	return conns
}

func (o *owner) listener() (net.Listener, error) {
	if o.companion != nil {
		return nil, hint(ErrUnsupported, "the member has an IPv4 and an IPv6 socket: use tcp4 and tcp6")
	}
	return o.s.ln, nil
}
