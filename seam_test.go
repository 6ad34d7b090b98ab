package lblisten

// The seam: the one place where tests look behind the public API, at what an
// address, a member or the dispatcher is doing at the moment. Each function says
// what it must mean; how it finds that out is the core's affair, and changes here
// when the core does. Pure functions (keys, frames, programs, places) are called by
// their tests themselves, and the handoff's tests look into the handoff.

import (
	"net"
	"syscall"
	"time"
	"unsafe"
)

// openAddresses is how many addresses this process listens on, by this package:
// those that are being opened or closed count too.
func openAddresses() int {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	return len(registry.groups)
}

// waiting is how many Accepts of a member are in progress and wait, so that what
// happens from now on (a connection, a deadline, Close) finds them waiting.
func waiting(l *Listener) int {
	if l.ln != nil {
		return int(l.state.Load() & countMask)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since.Load() == leaderOnly {
		return 1
	}
	return len(l.waiters)
}

// socketsAt is every listening socket that this process serves at a member's
// address: those of all members, and the shared ones.
func socketsAt(l *Listener) []syscall.RawConn { return l.g.conns() }

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
func ownQueued(l *Listener) bool { return l.ownReadable() }

// undelivered is how many connections the dispatcher of a member's address has accepted
// and not given to anybody: those that are held for a busy member, those whose
// Accept went away, and those on their way to one.
func undelivered(l *Listener) int {
	d := l.g.d
	return int(d.holding.Load()) + int(d.loose.Load()) + len(d.leader.message)
}

// slowGiver returns what gives a connection in the dispatcher's hand to a waiting Accept,
// and tells whether one took it. It is a slow one: it has looked which members there
// are when slowGiver is called, and doesn't hear of one that closes later.
func slowGiver(g *Group) (give func(c net.Conn) bool) {
	members := g.g.members.Load()
	return func(c net.Conn) bool {
		g.g.members.Store(members)
		sent, _ := g.g.d.give(c, 1, nil, nil)
		return sent
	}
}

// setRetryAfter sets how long after an error that may pass those who wait get
// another try, at addresses that are opened from now on, and returns what puts it
// back. An hour takes away the net under the rope: who is overlooked then hangs.
func setRetryAfter(d time.Duration) (back func()) { return set(&retryAfter, d) }

// set sets a variable, and returns what puts it back.
func set[T any](p *T, v T) func() {
	before := *p
	*p = v
	return func() { *p = before }
}

// countInherited and countAccepted are the two halves of what an Accept counts
// that returns an inherited connection, in this order.
func countInherited(l *Listener) { l.inherited.Add(1) }

func countAccepted(l *Listener) { l.accepted.Add(1) }

// A hotField is what Accepts write or read all the time: the bytes from begin to
// end of a struct, with the next other field on either side.
type hotField struct {
	name                      string
	before, begin, end, after uintptr
}

// hotFields are those that need cache lines of their own.
func hotFields() []hotField {
	var l Listener
	var g group
	return []hotField{
		{"what every Accept of a member writes", 0, unsafe.Offsetof(l.state), unsafe.Offsetof(l.inherited) + unsafe.Sizeof(l.inherited), unsafe.Offsetof(l.g)},
		{"what every Accept of an address reads", unsafe.Offsetof(g.failed) + unsafe.Sizeof(g.failed), unsafe.Offsetof(g.ready), unsafe.Offsetof(g.ready) + unsafe.Sizeof(g.ready), unsafe.Offsetof(g.turn)},
	}
}

// What this system can do.

// setsBacklog: WithBacklog.
func setsBacklog() bool { return canSetBacklog }

// setsReusePort: WithReusePort.
func setsReusePort() bool { return canReusePort }

// handsOff: WithHandoff.
func handsOff() bool { return canHandoff }

// mostSockets is how many sockets the kernel's group of an address can have.
func mostSockets() int { return groupLimit }

// joinsKernel makes a socket that isn't bound yet a member of the kernel's group of
// the address that it will be bound to.
func joinsKernel(fd uintptr) error { return joinKernelGroup(fd) }
