package lblisten

// Listener: a member of a group, as its user sees it. It knows how to accept
// from a socket of its own; what is shared it takes by way of inherit.go, and
// the dispatcher's members accept in group.go.

import (
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/cpu"
)

var (
	_ net.Listener = (*Listener)(nil)
	_ syscall.Conn = (*Listener)(nil)
)

// A Listener is a member of a group. It is safe for use from many goroutines,
// and several may Accept at the same time.
type Listener struct {
	_ cpu.CacheLinePad
	// state has the number of Accepts in progress in its low 32 bits, then two
	// marks, and in the rest the number of times that Accepts were woken.
	state     atomic.Uint64
	accepted  atomic.Uint64
	inherited atomic.Uint64
	_         cpu.CacheLinePad

	g        *group
	id       uint64 // for rendezvous hashing
	log      *slog.Logger
	ln       *net.TCPListener   // of socks[0]; nil if the dispatcher balances
	socks    []*socket          // its own
	side     *watch             // of socks[1], where a dual-stack member has two
	onAccept func(*net.TCPConn) // nil but for steering by load, and for sockets of other processes
	left     bool               // it is no member any more; guarded by g.mu

	idle     chan struct{} // closed when the member is closed and no Accept is in progress
	idleOnce sync.Once
	ownTurn  atomic.Bool // the last connection was a shared one

	mu       sync.Mutex
	deadline time.Time   // the user's; guarded by mu
	timer    *time.Timer // of deadline, for the dispatcher; guarded by mu
	waiters  []*waiter   // Accepts that wait for the dispatcher; guarded by mu
	held     []*heldConn // connections that wait for this member; guarded by mu

	// For the dispatcher. since is that of waiters[0], 0 if nobody waits, or
	// leaderOnly: see standAlone. timed tells that there is a deadline.
	since atomic.Uint64
	timed atomic.Bool
}

// Accept waits for the next connection and returns it. For the TCP networks it
// is a bare *net.TCPConn, for unix networks a *net.UnixConn, as from package
// net, with the same options set, and the errors are net's too: EMFILE and the
// like reach one caller unchanged. After Close it returns a *net.OpError around
// [net.ErrClosed], after the deadline one around [os.ErrDeadlineExceeded]. It
// may return a connection after Close has begun, as net's may.
func (l *Listener) Accept() (net.Conn, error) {
	if l.ln == nil {
		return l.acceptDispatched()
	}
	c, err := l.acceptOwn()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptTCP is Accept for listeners of TCP. Of any other it returns
// [ErrUnsupported] and accepts nothing.
func (l *Listener) AcceptTCP() (*net.TCPConn, error) {
	if l.ln != nil {
		return l.acceptOwn()
	}
	if !l.g.d.isTCP {
		return nil, l.opError("accept", ErrUnsupported)
	}
	c, err := l.acceptDispatched()
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Close ends the member. Blocked and later Accepts return an error around
// [net.ErrClosed]. What waits in the member's queue, and what will still arrive
// there, goes to its siblings: they have it when Close returns. When the member
// is the last of its group in this process, its sockets are closed, and what
// waits is reset, or inherited by another process (see Info.OnClose).
//
// Close doesn't wait for peers. A second Close changes nothing and returns what
// net's second Close does.
func (l *Listener) Close() error { return l.g.close([]*Listener{l}) }

// beginClose marks the member as closed and wakes its Accepts. It returns false
// if the member was closed already.
func (l *Listener) beginClose() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state.Load()&closedMark != 0 {
		return false
	}
	state := l.state.Add(closedMark + wakeUnit)
	if state&countMask == 0 {
		l.idleOnce.Do(func() { close(l.idle) })
	}
	if l.ln != nil {
		l.ln.SetDeadline(longAgo)
	} else {
		l.setTimer(time.Time{})
		l.wakeAll(l.opError("accept", net.ErrClosed))
	}
	return true
}

// awaitIdle waits until no Accept of a closed member is in progress. That takes
// no time, but a listener behind Dispatch may not keep what SetDeadline
// promises, and Close must return.
func (l *Listener) awaitIdle() {
	select {
	case <-l.idle:
	case <-time.After(time.Second):
	}
	if l.side != nil {
		l.side.stop()
	}
}

// Addr returns the listener's address, which all members of the group share.
func (l *Listener) Addr() net.Addr { return l.g.addr }

// SetDeadline sets the time at which Accept fails with an error around
// [os.ErrDeadlineExceeded], also if a connection is waiting then, as net's do.
// The zero time means no deadline. It is this member's alone.
func (l *Listener) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := l.state.Load()
	if state&closedMark != 0 {
		return net.ErrClosed // as net's: the only error that isn't a *net.OpError
	}
	l.deadline = t
	switch {
	case l.ln == nil:
		l.timed.Store(!t.IsZero())
		l.setTimer(t)
	case state&kickedMark == 0:
		return l.ln.SetDeadline(t)
	}
	return nil // of a kicked member, leaveMarked sets it
}

// SyscallConn returns the member's socket, or the one that it shares with its
// siblings if the dispatcher balances. It is [ErrUnsupported] for a member
// with two sockets (on FreeBSD, "tcp" on a wildcard address: use tcp4 and tcp6),
// and for Dispatch of a listener that has no socket.
func (l *Listener) SyscallConn() (syscall.RawConn, error) {
	ln, err := l.socketHolder("raw-control")
	if err != nil {
		return nil, err
	}
	c, ok := ln.(syscall.Conn)
	if !ok {
		return nil, l.opError("raw-control", ErrUnsupported)
	}
	return c.SyscallConn()
}

// File returns a duplicate of the socket that SyscallConn returns, under the
// same conditions. As long as it is open the socket stays in the kernel's
// group, and gets its share of the connections, after Close too. Its Fd method
// makes the socket a blocking one: use SyscallConn for the descriptor.
func (l *Listener) File() (*os.File, error) {
	ln, err := l.socketHolder("file")
	if err != nil {
		return nil, err
	}
	f, ok := ln.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, l.opError("file", ErrUnsupported)
	}
	return f.File()
}

// socketHolder returns the listener of package net that has the member's socket.
func (l *Listener) socketHolder(op string) (net.Listener, error) {
	switch {
	case l.state.Load()&closedMark != 0:
		return nil, l.opError(op, net.ErrClosed)
	case l.ln == nil:
		return l.g.d.ln, nil
	case len(l.socks) > 1:
		return nil, l.opError(op, &hintedError{ErrUnsupported, "the member has an IPv4 and an IPv6 socket: use tcp4 and tcp6"})
	}
	return l.ln, nil
}

// Info returns what is in force. Of a closed listener it is the zero Info, with
// net.ErrClosed as the Reason.
func (l *Listener) Info() Info {
	if l.state.Load()&closedMark != 0 {
		return Info{Reason: net.ErrClosed}
	}
	return l.g.info()
}

// Stats returns the listener's counters. After Close, Accepted and Inherited
// stay what they were, and nothing is queued.
func (l *Listener) Stats() Stats {
	var s Stats
	s.Accepted, s.Inherited = l.counts()
	switch {
	case l.state.Load()&closedMark != 0:
	case l.ln == nil:
		s.Queued, s.Backlog = queueLengths(l.g.d.conns())
	default:
		conns := make([]syscall.RawConn, len(l.socks))
		for i, sock := range l.socks {
			conns[i] = sock.conn
		}
		s.Queued, s.Backlog = queueLengths(conns)
	}
	return s
}

// counts returns how many connections Accept has returned, and how many of them
// were inherited, which are counted an instant before.
func (l *Listener) counts() (accepted, inherited uint64) {
	accepted = l.accepted.Load()
	return accepted, min(accepted, l.inherited.Load())
}

// opError has the form of net's errors for a listener.
func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: l.g.network, Addr: l.g.addr, Err: err}
}
