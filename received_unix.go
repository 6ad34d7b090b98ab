//go:build unix && !aix

package lblisten

// Sockets that another process has opened: how a descriptor is held, what is checked
// before it is trusted, and how a listener is made of it. Nothing here knows by which
// way it came.

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A descriptor is a raw file descriptor that is closed with its last use. It is
// no *os.File, because that would have the runtime's poller wait on it.
type descriptor struct {
	fd   int
	refs atomic.Int32
}

func newDescriptor(fd int) *descriptor {
	d := &descriptor{fd: fd}
	d.refs.Store(1)
	return d
}

func (d *descriptor) hold() *descriptor {
	d.refs.Add(1)
	return d
}

func (d *descriptor) release() {
	if d != nil && d.refs.Add(-1) == 0 {
		unix.Close(d.fd)
	}
}

// duplicate returns a descriptor of its own for a socket.
func duplicate(fd uintptr) (*descriptor, error) {
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return newDescriptor(dup), nil
}

// keyOf tells one socket from another, as long as it is open.
func keyOf(fd int) (key fileKey) {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil {
		key = fileKey{uint64(st.Dev), uint64(st.Ino)}
	}
	return key
}

// isScarce tells whether a descriptor is one of the last quarter that this process
// may have: those aren't for the sockets of others.
func isScarce(fd int) bool {
	var limit unix.Rlimit
	return unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && uint64(fd) >= uint64(limit.Cur)/4*3
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

// checkListening checks that a socket, said to be one of network sub, listens at a
// place.
func checkListening(fd int, at place, sub string) error {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	parts := at.split()
	i := slices.IndexFunc(parts, func(part place) bool { return part.network == sub })
	if i < 0 {
		return fmt.Errorf("a socket for network %q", sub)
	}
	part := parts[i]
	wrong := fmt.Errorf("a socket that doesn't listen on %v", part)
	host, _, _ := strings.Cut(part.host, "%")
	ip, _ := netip.ParseAddr(host)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		if sub != "tcp4" || netip.AddrFrom4(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
	case *unix.SockaddrInet6:
		if sub == "tcp4" || netip.AddrFrom16(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
		if ip.IsUnspecified() && isV6Only(uintptr(fd)) == (sub == "tcp") {
			return wrong
		}
	case *unix.SockaddrUnix:
		if sa.Name != at.host {
			return wrong
		}
	default:
		return wrong
	}
	is := factsOf(uintptr(fd))
	switch {
	case at.space != 0 && is.space != at.space:
		return errors.New("a socket of another network namespace")
	case !at.isFile() && is.device != at.device:
		return errors.New("a socket that is bound to another device")
	case !listens(fd):
		return errors.New("a socket that doesn't listen")
	}
	return nil
}

// bySocket returns the place with the port, or the name, that the system has chosen for a
// socket.
func (p place) bySocket(fd int) place {
	switch sa, _ := unix.Getsockname(fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		p.port = sa.Port
	case *unix.SockaddrInet6:
		p.port = sa.Port
	case *unix.SockaddrUnix:
		p.host = sa.Name
	}
	return p
}

// listens tells whether a socket listens.
func listens(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && on != 0
}

// listenerOf makes a listener of package net on a duplicate of a socket. It never
// goes by os.File.Fd of a file that it put into non-blocking mode, because that
// would make the description a blocking one, for all processes.
func listenerOf(d *descriptor) (net.Listener, error) {
	dup, err := duplicate(uintptr(d.fd))
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup.fd), "received")
	defer f.Close()
	return net.FileListener(f)
}
