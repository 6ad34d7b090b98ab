package lblisten

// Accept from a socket of one's own, where the kernel balances. What is shared it
// takes by way of inherit.go.

import (
	"errors"
	"net"
	"os"
	"time"
)

const (
	countMask  = 1<<32 - 1
	closedMark = 1 << 32
	kickedMark = 1 << 33
	wakeUnit   = 1 << 34
)

// longAgo is a deadline that ends a blocked Accept at once.
var longAgo = time.Unix(1, 0)

// acceptOwn accepts from the member's own socket, or takes from a shared one.
func (l *Listener) acceptOwn() (*net.TCPConn, error) {
	for owes := false; ; { // whether a kick was meant for this Accept
		state := l.state.Add(1)
		c, err := l.acceptOnce(state)
		owes = l.leave() || owes
		if err == nil {
			l.accepted.Add(1)
			if l.onAccept != nil {
				l.onAccept(c)
			}
			if owes {
				l.g.offerReady(l)
			}
			return c, nil
		}
		timeout := errors.Is(err, os.ErrDeadlineExceeded)
		if timeout && l.wokenSince(state) {
			continue
		}
		if owes && (timeout || errors.Is(err, net.ErrClosed)) {
			// Not after other errors: who is kicked then gets the same one.
			l.g.offerReady(l)
		}
		return nil, err
	}
}

// acceptOnce is one try of an Accept that was counted in with state.
func (l *Listener) acceptOnce(state uint64) (*net.TCPConn, error) {
	if state&closedMark != 0 {
		return nil, l.opError("accept", net.ErrClosed)
	}
	if l.g.ready.Load() != 0 {
		if c, err := l.takeShared(state&countMask == 1); c != nil || err != nil {
			return c, err
		}
	}
	c, err := l.ln.AcceptTCP()
	if op, ok := err.(*net.OpError); ok && l.side != nil {
		return nil, l.opError(op.Op, op.Err) // one of two sockets, with an address of its own
	}
	return c, err
}

// wokenSince tells whether a timeout was a wake-up and not the user's deadline,
// for an Accept that was counted in with state.
func (l *Listener) wokenSince(state uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.state.Load()
	woken := state&kickedMark != 0 || now/wakeUnit != state/wakeUnit
	return now&closedMark != 0 || woken && !l.expired()
}

// leave counts an Accept out. It is all there is to it on the fast path. It
// returns true if the member was kicked, so that this Accept now owes a look at
// the watched sockets.
func (l *Listener) leave() bool {
	state := l.state.Add(^uint64(0))
	return state&(kickedMark|closedMark) != 0 && l.leaveMarked(state)
}

// leaveMarked is leave for a member that was kicked, closed, or both.
func (l *Listener) leaveMarked(state uint64) bool {
	if state&closedMark != 0 && state&countMask == 0 {
		l.idleOnce.Do(func() { close(l.idle) })
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	state = l.state.Load()
	if state&kickedMark == 0 {
		return false
	}
	if state&closedMark == 0 {
		l.ln.SetDeadline(l.deadline)
	}
	// After that: an Accept that sees no mark blames nobody else for a timeout.
	l.state.Add(^uint64(kickedMark - 1))
	return true
}

// kick wakes an Accept of the member, so that it looks at the watched sockets,
// or finds one on its way already. It returns false if no Accept waits.
func (l *Listener) kick() bool {
	if l.state.Load()&countMask == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if state := l.state.Load(); state&(closedMark|kickedMark) != 0 {
		return state&closedMark == 0
	}
	if state := l.state.Add(kickedMark + wakeUnit); state&countMask == 0 {
		l.state.Add(^uint64(kickedMark - 1)) // the last one has just left
		return false
	}
	l.ln.SetDeadline(longAgo)
	return true
}

// takeShared accepts from a watched socket that is ready: nil and no error if
// there is none, or if it is the turn of the member's own socket. That has a
// turn only when this Accept is alone: no other can take away then what is seen
// in the queue, and leave this one waiting there.
func (l *Listener) takeShared(alone bool) (*net.TCPConn, error) {
	l.mu.Lock()
	expired := l.expired()
	l.mu.Unlock()
	if expired || alone && l.ownTurn.Swap(false) && l.ownReadable() {
		return nil, nil // its own socket has the answer
	}
	shared := *l.g.shared.Load()
	n := len(shared)
	if l.side != nil {
		n++
	}
	turn := int(l.g.turn.Add(1) % maxMembers)
	for i := range n {
		w := l.side
		if j := (turn + i) % n; j < len(shared) {
			w = shared[j]
		}
		c, err := w.take()
		if c == nil && err == nil {
			continue
		}
		l.ownTurn.Store(true)
		if c != nil && w.owner == nil {
			l.inherited.Add(1)
		}
		return c, err
	}
	return nil, nil
}

func (l *Listener) ownReadable() bool {
	r := false
	l.socks[0].conn.Control(func(fd uintptr) { r = readable(fd) })
	return r
}

// expired tells whether the user's deadline has passed. It is called under l.mu.
func (l *Listener) expired() bool {
	return !l.deadline.IsZero() && !time.Now().Before(l.deadline)
}
