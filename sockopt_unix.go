//go:build unix

package lblisten

// What every unix does alike with a listening socket.

import (
	"errors"
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
// length of its queue and nothing else.
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
		return os.NewSyscallError("listen", unix.Listen(int(fd), n))
	})
}

// readable tells whether a connection waits in a listening socket. It doesn't
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

// isPassing tells whether a failed accept is worth trying again: the system or
// the process is short of something, or the connection was gone already.
func isPassing(err error) bool {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EAGAIN,
			unix.ECONNABORTED, unix.ECONNRESET, unix.EPERM, unix.EPROTO, unix.ENETDOWN,
			unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ETIMEDOUT:
			return true
		}
	}
	return isTemporary(err)
}
