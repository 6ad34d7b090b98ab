package lblisten

// Listener: a member, as its user sees it. How it accepts is in owner.go, where the
// kernel balances, and in dispatch.go.

import (
	"log/slog"
	"net"
	"os"
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
	_         cpu.CacheLinePad
	accepted  atomic.Uint64
	inherited atomic.Uint64
	_         cpu.CacheLinePad

	role
	a    *address
	log  *slog.Logger
	left bool // it is no member any more; guarded by a.mu
}

// An role is how a member accepts: it is an *owner or a *follower.
type role interface {
	accept() (c net.Conn, inherited bool, err error)
	setDeadline(t time.Time) error   // net.ErrClosed if it is closed
	close() <-chan struct{}          // ends its Accepts: closed when none is in progress; nil if it was closed before
	isClosed() bool                  // close was called
	wake() bool                      // has an Accept look what is ready; false if none waits
	waiting() int                    // Accepts in progress
	leaveBehind() []*watch           // the sockets that it has for itself, to be shared
	conns() []syscall.RawConn        // its sockets, or the one of all
	listener() (net.Listener, error) // of package net, that has the socket
}

// Accept waits for the next connection and returns it. For the TCP networks it
// is a bare *net.TCPConn, for unix networks a *net.UnixConn, as from package
// net, with the same options set, and the errors are net's too: EMFILE and the
// like reach one caller unchanged. After Close it returns a *net.OpError that wraps
// [net.ErrClosed], after the deadline one that wraps [os.ErrDeadlineExceeded]. It
// may return a connection after Close has begun, as net's may.
func (l *Listener) Accept() (net.Conn, error) {
	c, inherited, err := l.accept()
	if err != nil {
		return nil, err
	}
	if inherited {
		l.inherited.Add(1)
	}
	l.accepted.Add(1)
	if l.a.bell != nil {
		l.a.bell()
	}
	return c, nil
}

// AcceptTCP is Accept for listeners of TCP. For any other it returns
// [ErrUnsupported] and accepts nothing.
func (l *Listener) AcceptTCP() (*net.TCPConn, error) {
	if l.a.d != nil && !l.a.d.isTCP {
		return nil, l.a.opError("accept", ErrUnsupported)
	}
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Close ends the member. Blocked and later Accepts return an error that wraps
// [net.ErrClosed]. The connections that are queued at it, and those that still
// arrive there, go to its siblings: they have them when Close returns. When the
// member is the last of its address in this process, its sockets are closed, and
// queued connections are reset, or inherited by another process (see Info.OnClose).
//
// Close waits for other processes no longer than a second. A second Close changes
// nothing and returns an error that wraps net.ErrClosed.
func (l *Listener) Close() error { return l.a.close([]*Listener{l}) }

// Addr returns the listener's address, which all members of the address share.
func (l *Listener) Addr() net.Addr { return l.a.addr }

// String returns the network, the address and the balancer, for logs:
// "tcp 127.0.0.1:8080 (SO_REUSEPORT)".
func (l *Listener) String() string { return l.a.String() }

// SetDeadline sets the time at which Accept fails with an error that wraps
// [os.ErrDeadlineExceeded], also if a connection is queued then, as net's do.
// The zero time means no deadline. It is this member's alone.
func (l *Listener) SetDeadline(t time.Time) error { return l.setDeadline(t) }

// SyscallConn returns the member's socket, or the one that it shares with its
// siblings if the dispatcher balances. It is [ErrUnsupported] for a member
// with two sockets (on FreeBSD, "tcp" on a wildcard address: use tcp4 and tcp6),
// and for Dispatch of a listener that has no socket.
func (l *Listener) SyscallConn() (syscall.RawConn, error) {
	ln, err := l.holder("raw-control")
	if err != nil {
		return nil, err
	}
	c, ok := ln.(syscall.Conn)
	if !ok {
		return nil, l.a.opError("raw-control", ErrUnsupported)
	}
	return c.SyscallConn()
}

// File returns a duplicate of the socket that SyscallConn returns, under the
// same conditions. As long as it is open the socket stays in the kernel's
// group, and gets its share of the connections, after Close too. Its Fd method
// makes the socket a blocking one: use SyscallConn for the descriptor.
func (l *Listener) File() (*os.File, error) {
	ln, err := l.holder("file")
	if err != nil {
		return nil, err
	}
	f, ok := ln.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, l.a.opError("file", ErrUnsupported)
	}
	return f.File()
}

// holder returns the listener of package net that has the member's socket.
func (l *Listener) holder(op string) (net.Listener, error) {
	if l.isClosed() {
		return nil, l.a.opError(op, net.ErrClosed)
	}
	ln, err := l.listener()
	if err != nil {
		return nil, l.a.opError(op, err)
	}
	return ln, nil
}

// Info returns what is in force. For a closed listener it is the zero Info, with
// net.ErrClosed as the Reason.
func (l *Listener) Info() Info {
	if l.isClosed() {
		return Info{Reason: net.ErrClosed}
	}
	return l.a.info()
}

// Stats returns the listener's counters. After Close, Accepted and Inherited
// stay what they were, and nothing is queued.
func (l *Listener) Stats() Stats {
	var s Stats
	s.Accepted, s.Inherited = l.counts()
	if !l.isClosed() {
		s.Queued, s.Backlog = queueLengths(l.conns())
	}
	return s
}

// counts returns how many connections Accept has returned, and how many of them
// were inherited, which are counted an instant before.
func (l *Listener) counts() (accepted, inherited uint64) {
	accepted = l.accepted.Load()
	return accepted, min(accepted, l.inherited.Load())
}
