package lblisten

// The seam: the one place where tests look behind the public API, at what an
// address, a member or the dispatcher is doing at the moment. Each function says
// what it must mean; how it finds that out is the core's affair, and changes here
// when the core does. Pure functions (keys, frames, programs, places) are called by
// their tests themselves, and the handoff's tests look into the handoff.

import (
	"context"
	"net"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// openAddresses is how many addresses this process listens on, by this package:
// those that are being opened or closed count too.
func openAddresses() int {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	return len(registry.addresses)
}

// waiting is how many Accepts of a member are in progress and wait, so that what
// happens from now on (a connection, a deadline, Close) finds them waiting.
func waiting(l *Listener) int { return l.waiting() }

// socketsAt is every listening socket that this process serves at a member's
// address: those of all members, and the shared ones.
func socketsAt(l *Listener) []syscall.RawConn { return l.a.conns() }

// queuesOf sums the lengths of the queues of listening sockets, and the limits in
// force for them; both are -1 where the system doesn't tell.
func queuesOf(conns []syscall.RawConn) (queued, backlog int) { return queueLengths(conns) }

// queuedAt is how many connections are queued at a member's address, -1 if the
// system doesn't tell.
func queuedAt(l *Listener) int {
	queued, _ := queuesOf(socketsAt(l))
	return queued
}

// ownQueued tells whether a connection is queued in the member's own socket.
func ownQueued(l *Listener) bool { return l.role.(*owner).s.readable() }

// undelivered is how many connections the dispatcher of a member's address has accepted
// and not given to anybody: those that are held for a busy member, those whose
// Accept went away, and those on their way to one.
func undelivered(l *Listener) int {
	d := l.a.d
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.hand)
	for _, f := range d.members {
		n += len(f.given)
	}
	return n
}

// slowGiver returns what gives a connection in the dispatcher's hand to a waiting Accept,
// and tells whether one took it.
func slowGiver(g *Group) (give func(c net.Conn) bool) {
	d := g.a.d
	return func(c net.Conn) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.giveLocked(arrival{c: c})
	}
}

// set sets a variable, and returns what puts it back.
func set[T any](p *T, v T) func() {
	before := *p
	*p = v
	return func() { *p = before }
}

// countInherited and countAccepted are the two halves of what an Accept counts
// that returns an inherited connection, in this order.
func countInherited(l *Listener) { l.inherited.Add(1) }
func countAccepted(l *Listener)  { l.accepted.Add(1) }

// A hotField is what Accepts write or read all the time: the bytes from begin to
// end of a struct, with the next other field on either side.
type hotField struct {
	name                      string
	before, begin, end, after uintptr
}

// hotFields are those that need cache lines of their own.
func hotFields() []hotField {
	var l Listener
	var o owner
	var a address
	return []hotField{
		{"what every Accept of a member counts", 0, unsafe.Offsetof(l.accepted), unsafe.Offsetof(l.inherited) + unsafe.Sizeof(l.inherited), unsafe.Offsetof(l.role)},
		{"what every Accept of an owner counts", unsafe.Offsetof(o.deadline) + unsafe.Sizeof(o.deadline), unsafe.Offsetof(o.inside), unsafe.Offsetof(o.inside) + unsafe.Sizeof(o.inside), unsafe.Sizeof(o)},
		{"what every Accept of an address reads", unsafe.Offsetof(a.log) + unsafe.Sizeof(a.log), unsafe.Offsetof(a.ready), unsafe.Offsetof(a.ready) + unsafe.Sizeof(a.ready), unsafe.Offsetof(a.begins)},
	}
}

// What this system can do.

// setsBacklog: WithBacklog.
func setsBacklog() bool { return canSetBacklog }

// limitQueue sets the length of a socket's queue.
func limitQueue(ln net.Listener, n int) error { return setBacklog(ln, n) }

// setsReusePort: WithReusePort.
func setsReusePort() bool { return canReusePort }

// handsOff: WithHandoff.
func handsOff() bool { return canHandoff }

// mostSockets is how many sockets the kernel's group of an address can have.
func mostSockets() int { return system.groupLimit }

// joinsKernel makes a socket that isn't bound yet a member of the kernel's group of
// the address that it will be bound to.
func joinsKernel(fd uintptr) error { return joinKernelGroup(fd) }

// resolved is what package net and the kernel make of an address.
func resolved(network, address string) (at place, noKernel, err error) {
	req, err := resolve(context.Background(), network, address, new(config))
	if err != nil {
		return place{}, nil, err
	}
	return req.at, req.noKernel, nil
}

// askAll has the dispatcher ask connections of any type for their addresses, until
// the test ends.
func askAll(t testing.TB) {
	t.Helper()
	t.Cleanup(set(&addrsOf, func(c net.Conn) (local, remote net.Addr, ok bool) { return c.LocalAddr(), c.RemoteAddr(), true }))
}

// comesAfterDeadline has a connection come into the dispatcher's hand in the instant in
// which a member's deadline has passed and its Accepts haven't seen that yet.
func comesAfterDeadline(l *Listener, c net.Conn) {
	f := l.role.(*follower)
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.deadline = longAgo
	f.d.passLocked(arrival{c: c})
}

// joinWithNewSocket opens a member on the address of another that adopts no socket.
func joinWithNewSocket(t testing.TB, of *Listener) *Listener {
	t.Helper()
	a := of.a
	a.turn <- struct{}{}
	defer a.giveTurn()
	s, err := a.openSocket(context.Background(), a.at, &request{config: new(config), network: a.network, at: a.at, literal: a.at.String()})
	require.NoError(t, err)
	l := &Listener{a: a, role: newOwner(a, newWatch(a, s, nil))}
	a.mu.Lock()
	a.joining++
	a.mu.Unlock()
	a.joined(1, []*Listener{l}, nil)
	return l
}

// dropShared closes shared sockets of a group's address until so many are left.
func dropShared(t testing.TB, g *Group, left int) {
	t.Helper()
	a := g.a
	a.turn <- struct{}{}
	defer a.giveTurn()
	for len(*a.shared.Load()) > left {
		s := a.adopt(context.Background(), a.at.network)
		a.k.discard(s)
	}
}

// oneMore makes one more member of what Dispatch has made.
func oneMore(g *Group) *Listener {
	a := g.a
	a.mu.Lock()
	a.joining++
	a.mu.Unlock()
	l := &Listener{a: a, role: a.d.join()}
	a.joined(1, []*Listener{l}, nil)
	g.members = append(g.members, l)
	return l
}
