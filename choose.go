package lblisten

// Whose turn an arrival is, of the dispatcher's members that wait; and what is kept
// for a moment because nobody waits, or the one that should have it is busy.

import (
	"fmt"
	"net"
	"slices"
	"time"
)

// How long, and how many, connections are held for busy members by SteerSource.
const (
	holdTime = 100 * time.Millisecond
	holdMost = 16
)

// giveLocked gives something to the member whose turn it is. It returns false if
// that is the leader's, or nobody waits.
func (d *dispatcher) giveLocked(r arrival) bool {
	if d.asleep == 0 {
		return false
	}
	f := d.nextLocked(d.keyLocked(r))
	if f == nil || f == d.leader {
		return false
	}
	f.given = append(f.given, r)
	d.asleep--
	d.servedLocked(f)
	f.wakeUp.Signal()
	return true
}

// servedLocked puts a member last in the order of SteerLoad.
func (d *dispatcher) servedLocked(f *follower) {
	d.seq++
	f.since = d.seq
}

// passLocked gives something away, or keeps it for whoever looks next. An error that
// nobody waits for any more is dropped: whoever asks next asks the listener.
func (d *dispatcher) passLocked(r arrival) {
	if r.isNothing() || d.giveLocked(r) || r.err != nil {
		return
	}
	d.hand = append(d.hand, &inHand{arrival: r})
	if d.leader != nil {
		d.interruptLocked()
	}
}

// keyLocked is what decides whose turn it is. What is no connection is anybody's.
func (d *dispatcher) keyLocked(r arrival) uint64 {
	if r.c == nil || d.a.steering == SteerLoad {
		return d.seq
	}
	local, remote, ok := addrsOf(r.c)
	if d.a.steering != SteerSource {
		return flowKey(local, remote)
	}
	if !ok && d.opaque == "" {
		d.opaque = fmt.Sprintf("%T", r.c)
	}
	return sourceKey(remote)
}

// whyNotBySource tells why SteerSource doesn't steer some of the connections.
func (d *dispatcher) whyNotBySource() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opaque == "" {
		return nil
	}
	return fmt.Errorf("connections of type %s can't be asked for their source without the risk of waiting: they go to any member", d.opaque)
}

// nextLocked returns the member whose turn it is, of those that wait; nil if none does.
func (d *dispatcher) nextLocked(key uint64) *follower {
	if d.a.steering != SteerLoad {
		return d.rankLocked(key, d.waitsLocked)
	}
	var next *follower
	for _, f := range d.members {
		if d.waitsLocked(f) && (next == nil || f.since < next.since) {
			next = f
		}
	}
	return next
}

// rankLocked returns the member that is first in rank for a key, of those that may
// be chosen; nil if none may.
func (d *dispatcher) rankLocked(key uint64, may func(*follower) bool) *follower {
	first := firstInRank(key, len(d.members), func(i int) uint64 { return d.members[i].id }, func(i int) bool { return may(d.members[i]) })
	if first < 0 {
		return nil
	}
	return d.members[first]
}

// waitsLocked tells whether a member has an Accept to which something can be given.
func (d *dispatcher) waitsLocked(f *follower) bool {
	return (f.asleep > len(f.given) || f == d.leader && !f.closed) && !f.expiredLocked()
}

// holdLocked keeps a connection for the member that is first in rank for its source,
// if that is busy and not too many are kept already.
func (d *dispatcher) holdLocked(r arrival) bool {
	if d.a.steering != SteerSource || r.c == nil || d.held == holdMost {
		return false
	}
	f := d.rankLocked(d.keyLocked(r), func(*follower) bool { return true })
	if f == nil || d.waitsLocked(f) {
		return false
	}
	h := &inHand{arrival: r, of: f}
	h.timer = time.AfterFunc(holdTime, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if i := slices.Index(d.hand, h); i >= 0 {
			d.passLocked(d.takeLocked(i).arrival)
		}
	})
	d.hand = append(d.hand, h)
	d.held++
	return true
}

// takeLocked takes something out of the hand.
func (d *dispatcher) takeLocked(i int) *inHand {
	h := d.hand[i]
	d.hand = slices.Delete(d.hand, i, i+1)
	if h.of != nil {
		h.timer.Stop()
		d.held--
	}
	return h
}

// addrsOf returns the addresses of a connection, if it is of a type whose methods
// are known not to block: whoever asks holds up others. Others may read from the
// network for it, as those that begin with a PROXY header do. Tests put types of their
// own among the known ones.
var addrsOf = func(c net.Conn) (local, remote net.Addr, ok bool) {
	for {
		switch known := c.(type) {
		case *net.TCPConn, *net.UnixConn:
			return known.LocalAddr(), known.RemoteAddr(), true
		}
		if !isTLS(c) {
			return nil, nil, false
		}
		c = c.(interface{ NetConn() net.Conn }).NetConn()
	}
}
