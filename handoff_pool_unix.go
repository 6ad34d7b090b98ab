//go:build unix && !aix

package lblisten

// The sockets of a handoff as one process knows them: which of them its groups
// share, and whether one that came from another process is what it is said to
// be. It doesn't know how the others are told or heard (handoff_link_unix.go), nor
// what a group does with a socket that it shares (inherit.go).

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A pooled is a socket of the set, as this process knows it.
type pooled struct {
	id       socketID
	d        *descriptor
	sub      string // the network of the socket, where a member has two
	balanced bool   // it is one of the kernel's group

	// What follows is guarded by handoff.mu.
	at     place    // the address of its group; port 0 until it is known
	role   poolRole // what it is to this process
	owner  processID
	fresh  bool          // it came while the hub had not told everything yet
	kept   chan struct{} // closed when the others have it, for who waits for that
	isKept bool          // they have it, as far as is known
}

// A poolRole is what a socket of the pool is to this process. Only balanced ones are
// owned or shared, because the dispatcher of a group has one socket for all.
type poolRole byte

const (
	roleNone    poolRole = iota // left alone: another process accepts from it, or no group of it is here
	roleOwned                   // this process accepts from it, or what a member of it left is shared here
	roleShared                  // this process shares it, because nobody is known to accept from it
	roleRefused                 // left alone for good: it is not what it is said to be
)

// ownLocked: a member of this process accepts from the socket from here on.
func (p *pooled) ownLocked() { p.role = roleOwned }

// disownLocked ends that. It does nothing in another role.
func (p *pooled) disownLocked() {
	if p.role == roleOwned {
		p.role = roleNone
	}
}

// shareLocked: the group of the socket shares it from here on.
func (p *pooled) shareLocked() { p.role = roleShared }

// unshareLocked ends that. It does nothing in another role, and returns false.
func (p *pooled) unshareLocked() bool {
	if p.role != roleShared {
		return false
	}
	p.role = roleNone
	return true
}

// refuseLocked: the socket was looked at and is not what it is said to be. That
// is final. What this process owns is never looked at.
func (p *pooled) refuseLocked() { p.role = roleRefused }

func (p *pooled) flagsLocked() (flags byte) {
	if p.role == roleOwned {
		flags |= flagMine
	}
	if p.balanced {
		flags |= flagBalanced
	}
	return flags
}

// forgetLocked takes a socket out of the pool.
func (h *handoff) forgetLocked(p *pooled) {
	delete(h.sockets, p.id)
	p.d.release()
	if p.unshareLocked() {
		h.dropped = append(h.dropped, p)
		h.change()
	}
}

// keepLocked notes that the others have a socket.
func (p *pooled) keepLocked() {
	p.isKept = true
	if p.kept != nil {
		close(p.kept)
		p.kept = nil
	}
}

// A step is a socket that a group is to share, or to take back. The group is nil
// if it has left.
type step struct {
	p *pooled
	a *address
}

// settle shares with its group what nobody is known to accept from, and takes
// back what somebody does.
func (h *handoff) settle() {
	writeNotes(h.apply())
}

// apply does what settle is to do. It returns what is to be logged, which is done
// without a lock, because a logger is the user's code.
func (h *handoff) apply() (logs []note) {
	h.applying.Lock()
	defer h.applying.Unlock()
	share, back := h.stepsLocked()
	for _, s := range back {
		if s.a != nil {
			s.a.takeBack(s.p)
		}
	}
	for _, s := range share {
		if say := h.takeLocked(s); say != nil {
			logs = append(logs, say)
		}
	}
	return logs
}

// stepsLocked returns what groups are to share, with a use of each descriptor, and
// what they are to take back. The lock is applying: nobody else takes steps.
func (h *handoff) stepsLocked() (share, back []step) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.dropped {
		back = append(back, step{p, h.addresses[p.at]})
	}
	h.dropped = nil
	for _, p := range h.sockets {
		a := h.addresses[p.at]
		if a == nil || p.role == roleOwned || p.role == roleRefused || !p.balanced || a.d != nil {
			continue
		}
		if p.fresh && h.w != nil {
			continue // the hub holds it, and this process may not be able to
		}
		// A claim of this process becomes its own only with the answer.
		switch free := h.alone || p.owner == (processID{}) || p.owner == h.process; {
		case free && p.role == roleNone && listens(p.d):
			p.shareLocked()
			p.d.hold()
			share = append(share, step{p, a})
		case !free && p.unshareLocked():
			back = append(back, step{p, a})
		}
	}
	return share, back
}

// takeLocked has a group share a socket. It returns what is to be logged of it. The
// lock is applying.
func (h *handoff) takeLocked(s step) (say func()) {
	sock, err := h.open(s.p, s.a)
	s.p.d.release()
	if err == nil {
		if !s.a.inherit(sock) {
			sock.ln.Close() // the group ends, and leaves the pool
			return nil
		}
		return func() {
			log(s.a.log, news, "this process serves a socket that nobody else is known to accept from", "path", h.path, "address", s.a.at)
		}
	}
	h.mu.Lock()
	s.p.unshareLocked()
	if !isShortage(err) {
		s.p.refuseLocked()
	}
	h.mu.Unlock()
	if isShortage(err) {
		time.AfterFunc(retryAfter, h.change)
	}
	return func() {
		log(s.a.log, trouble, "a socket of the handoff can't be used", "path", h.path, "address", s.a.at, "reason", err)
	}
}

// open makes a listening socket of a group out of one of the pool, after
// checking that it is what it is said to be.
func (h *handoff) open(p *pooled, a *address) (*socket, error) {
	if err := checkSocket(p, a); err != nil {
		return nil, err
	}
	ln, err := listenerOf(p.d)
	if err != nil {
		return nil, err
	}
	if _, ok := ln.(*net.TCPListener); !ok {
		ln.Close()
		return nil, fmt.Errorf("a %T, want TCP", ln)
	}
	s, err := newSocket(ln, p.sub, p)
	if err != nil {
		ln.Close()
		return nil, err
	}
	s.received = true
	return s, nil
}

// checkSocket checks that a socket of the pool listens on the address of a
// group, in its way.
func checkSocket(p *pooled, a *address) error {
	sa, err := unix.Getsockname(p.d.fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	split := a.at.split()
	i := slices.IndexFunc(split, func(at place) bool { return at.network == p.sub })
	if i < 0 {
		return fmt.Errorf("a socket for network %q", p.sub)
	}
	at := split[i]
	wrong := fmt.Errorf("a socket that doesn't listen on %v", at)
	host, _, _ := strings.Cut(at.host, "%")
	ip, _ := netip.ParseAddr(host)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		if at.network != "tcp4" || netip.AddrFrom4(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
	case *unix.SockaddrInet6:
		if at.network == "tcp4" || netip.AddrFrom16(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
		only, err := unix.GetsockoptInt(p.d.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil || ip.IsUnspecified() && (only == 0) != (at.network == "tcp") {
			return wrong
		}
	case *unix.SockaddrUnix:
		if sa.Name != at.host {
			return wrong
		}
	default:
		return wrong
	}
	if err := checkFacts(uintptr(p.d.fd), a.at); err != nil {
		return err
	}
	if p.balanced && !isBalanced(uintptr(p.d.fd)) {
		return errors.New("a socket that the kernel doesn't balance")
	}
	if !listens(p.d) {
		return errors.New("a socket that doesn't listen")
	}
	return nil
}

// checkFacts checks that a socket is in the network namespace of a place, if that
// has one, and bound to the same device. IPV6_V6ONLY belongs to the address.
func checkFacts(fd uintptr, at place) error {
	is := factsOf(fd)
	switch {
	case at.space != 0 && is.space != at.space:
		return errors.New("a socket of another network namespace")
	case !at.isFile() && is.device != at.device:
		return errors.New("a socket that is bound to another device")
	}
	return nil
}

// checkReceived checks a descriptor before anything is done with it.
func checkReceived(d *descriptor, at place) error {
	kind, err := unix.GetsockoptInt(d.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("a descriptor that is no socket: %w", os.NewSyscallError("getsockopt SO_TYPE", err))
	}
	want := unix.SOCK_STREAM
	if at.network == "unixpacket" {
		want = unix.SOCK_SEQPACKET
	}
	if kind != want {
		return fmt.Errorf("a socket of type %d, want %d", kind, want)
	}
	// The description is everybody's, and must never block anybody.
	return os.NewSyscallError("fcntl F_SETFL", unix.SetNonblock(d.fd, true))
}

// listens tells whether a socket listens.
func listens(d *descriptor) bool {
	on, err := unix.GetsockoptInt(d.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && on != 0
}

// isScarce tells whether a new descriptor is one of the last quarter that this
// process may have: those aren't for the sockets of others.
func isScarce(fd int) bool {
	var limit unix.Rlimit
	return unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && uint64(fd) >= uint64(limit.Cur)/4*3
}

// listenerOf makes a listener of package net on a duplicate of a socket. It never
// goes by os.File.Fd of a file that it put into non-blocking mode, because that
// would make the description a blocking one, for all processes.
func listenerOf(d *descriptor) (net.Listener, error) {
	dup, err := duplicate(uintptr(d.fd))
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup.fd), "handoff")
	defer f.Close()
	return net.FileListener(f)
}
