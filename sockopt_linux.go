package lblisten

// How a socket joins the kernel's group on Linux, what the kernel does with
// the queue of a socket that goes away, and how long that queue is.

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	kernelOption = "SO_REUSEPORT"

	// groupLimit is the most sockets the kernel takes into a group; past it
	// listen fails with ENOMEM, so nothing is starved.
	groupLimit = maxMembers

	// splitDualStack: a dual-stack socket is a good member here.
	splitDualStack = false
)

// joinKernelGroup makes a socket that is not bound yet a member of the group of
// the address it will be bound to. An error means that this kernel can't.
// SO_REUSEPORT is there from Linux 3.9.
func joinKernelGroup(fd uintptr) error {
	return os.NewSyscallError("setsockopt SO_REUSEPORT",
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
}

// kernelInherits tells whether the kernel gives the queue of a socket that is
// closed to the rest of its group, and if not, why. With
// net.ipv4.tcp_migrate_req (from Linux 5.14, for IPv6 as well) it does. The
// sysctl is that of the calling thread's network namespace.
func kernelInherits() (bool, error) {
	const sysctl = "net.ipv4.tcp_migrate_req"
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_migrate_req")
	if err != nil {
		return false, fmt.Errorf("the kernel resets the queue of a process that dies: %s: %w", sysctl, err)
	}
	if string(bytes.TrimSpace(b)) != "1" {
		return false, fmt.Errorf("the kernel resets the queue of a process that dies; set %s=1 to let it migrate", sysctl)
	}
	return true, nil
}

// queueLength returns the number of connections that wait in a listening
// socket, and the limit in force. Both are fields of TCP_INFO that mean
// something else on a connection (tcp_get_info in net/ipv4/tcp.c).
func queueLength(fd uintptr) (queued, backlog int) {
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return -1, -1
	}
	return int(info.Unacked), int(info.Sacked)
}
