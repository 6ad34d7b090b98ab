//go:build !unix

package lblisten

// What systems other than unix don't do with a listening socket.

import (
	"net"
	"runtime"
	"strings"
)

const canSetBacklog = false

func setBacklog(ln net.Listener, n int) error { return ErrUnsupported }

// readable is asked only about sockets of a kernel's group; there are none.
func readable(fd uintptr) bool { return false }

// isAddrInUse goes by the text: the syscall package has no EADDRINUSE on plan9,
// and on Windows one that the system doesn't return (WSAEADDRINUSE).
func isAddrInUse(err error) bool {
	if runtime.GOOS == "windows" {
		return strings.Contains(err.Error(), "Only one usage of each socket address")
	}
	return strings.Contains(err.Error(), "in use")
}

// isPassing tells whether a failed accept is worth trying again.
func isPassing(err error) bool { return isTemporary(err) }
