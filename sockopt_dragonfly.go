package lblisten

// How a socket joins the kernel's group on DragonFly, what the kernel does with
// the queue of a socket that goes away, and how long that queue is.

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	kernelOption = "SO_REUSEPORT"

	// groupLimit: the socket past it listens and never gets a connection.
	groupLimit = 256

	// splitDualStack: DragonFly has no dual-stack sockets.
	splitDualStack = false
)

// joinKernelGroup makes a socket that is not bound yet a member of the group of
// the address it will be bound to. An error means that this kernel can't:
// SO_REUSEPORT balances only while the sysctl net.inet.tcp.reuseport_ext is 1.
func joinKernelGroup(fd uintptr) error {
	const sysctl = "net.inet.tcp.reuseport_ext"
	on, err := unix.SysctlUint32(sysctl)
	if err != nil {
		return fmt.Errorf("sysctl %s: %w", sysctl, err)
	}
	if on == 0 {
		return errors.New("the sysctl " + sysctl + " is 0; set it to 1 to let the kernel balance")
	}
	return os.NewSyscallError("setsockopt SO_REUSEPORT",
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
}

// isBalanced tells whether a socket has joined so.
func isBalanced(fd uintptr) bool {
	on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT)
	return err == nil && on != 0
}

const canPin = false

// letKernelInherit: the kernel need not be asked. It gives completed and
// incomplete connections of a socket that closes to the last member of its group
// (sys/netinet/tcp_usrreq.c).
func letKernelInherit(fd uintptr, pinned string) (done func(), wont, err error) {
	return nil, nil, nil
}

// kernelInherits tells whether the kernel inherits now, and if not, why: wont is
// what letKernelInherit said.
func kernelInherits(wont error) (bool, error) { return wont == nil, wont }

// keepLooking: a connection always wakes who waits for it.
func keepLooking(func()) (stop func()) { return nil }

// queueLength: DragonFly doesn't tell.
func queueLength(fd uintptr) (queued, backlog int) { return -1, -1 }
