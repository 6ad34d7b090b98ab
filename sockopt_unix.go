//go:build unix

package lblisten

// What every unix does alike with a listening socket.

import (
	"errors"
	"math"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const canSetBacklog = true

// control runs f on the descriptor of a socket, and returns its error.
func control(c syscall.RawConn, f func(fd uintptr) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(fd) }); cerr != nil {
		return cerr
	}
	return err
}

// setBacklog calls listen(2) again on a listening socket, which changes the
// length of its queue and nothing else. The kernel takes an int of C, and cuts what is
// past its own limit.
func setBacklog(ln net.Listener, n int) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return ErrUnsupported
	}
	c, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	return control(c, func(fd uintptr) error {
		return os.NewSyscallError("listen", unix.Listen(int(fd), min(n, math.MaxInt32)))
	})
}

// isV6Only tells whether an IPv6 socket takes no IPv4.
func isV6Only(fd uintptr) bool {
	on, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	return err == nil && on != 0
}

// setV6Only sets that, before bind.
func setV6Only(fd uintptr, only bool) {
	on := 0
	if only {
		on = 1
	}
	unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, on)
}

// fileKeyAt returns the device and the inode of a file.
func fileKeyAt(path string) fileKey {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return fileKey{}
	}
	return fileKey{uint64(st.Dev), st.Ino}
}

// hasKeepAlive tells whether SO_KEEPALIVE is set.
func hasKeepAlive(fd uintptr) bool {
	on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
	return err == nil && on != 0
}

// readable tells whether a connection is queued in a listening socket. It doesn't
// block.
func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		switch n, err := unix.Poll(p, 0); err {
		case nil:
			return n > 0
		case unix.EINTR:
		default: // a filter forbids it
			queued, _ := queueLength(fd)
			return queued > 0
		}
	}
}

func isAddrInUse(err error) bool { return errors.Is(err, unix.EADDRINUSE) }
