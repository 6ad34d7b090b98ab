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

// kernelInherits tells whether the kernel gives the queue of a socket that is
// closed to the rest of its group, and if not, why. DragonFly gives completed
// and incomplete connections to the last member (sys/netinet/tcp_usrreq.c).
func kernelInherits() (bool, error) { return true, nil }

// queueLength: DragonFly doesn't tell.
func queueLength(fd uintptr) (queued, backlog int) { return -1, -1 }
