package lblisten

// DragonFly: how a socket joins the kernel's group, and what the kernel does with
// the queue of a socket that goes away.

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// system: the socket past the limit listens and never gets a connection.
// DragonFly has no dual-stack sockets.
var system = capabilities{option: "SO_REUSEPORT", groupLimit: 256}

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

func factsOf(fd uintptr) facts { return facts{only: isV6Only(fd)} }

// kernelInherits: the kernel gives completed and incomplete connections of a socket
// that closes to the last member of its group (sys/netinet/tcp_usrreq.c). Whether
// another process has one can't be asked, so it isn't claimed.
func kernelInherits() error {
	return errors.New("DragonFly's kernel gives the queue to another process's listener, but doesn't tell whether there is one")
}

// queueLength: DragonFly doesn't tell.
func queueLength(fd uintptr) (queued, backlog int) { return -1, -1 }
