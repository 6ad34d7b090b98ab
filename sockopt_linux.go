package lblisten

// How a socket joins the kernel's group on Linux, what the kernel does with
// the queue of a socket that goes away, and how long that queue is.

import (
	"bytes"
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

// isBalanced tells whether a socket has joined so.
func isBalanced(fd uintptr) bool {
	on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT)
	return err == nil && on != 0
}

const canPin = true

// migrateSysctl makes the kernel migrate without a program, from Linux 5.14, for
// IPv6 as well. It belongs to a network namespace.
const migrateSysctl = "net.ipv4.tcp_migrate_req"

// letKernelInherit makes the kernel give the queue of a socket that closes to
// the rest of its group, by a BPF program: the one pinned at a path, which must
// work then, or one that it loads. It returns why the kernel won't, and what to
// do when the group ends. The program must be attached after listen: on a group
// whose first socket doesn't listen yet it makes every later bind or listen fail
// with EADDRINUSE.
func letKernelInherit(fd uintptr, pinned string) (done func(), wont, err error) {
	if pinned != "" {
		return nil, nil, usePinned(int(fd), pinned)
	}
	if wont = useMigration(int(fd)); wont != nil {
		return nil, wont, nil
	}
	return dropMigration, nil, nil
}

// kernelInherits tells whether the kernel inherits now, and if not, why: wont is
// what letKernelInherit said.
func kernelInherits(wont error) (bool, error) {
	if wont == nil {
		return true, nil
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_migrate_req") // of this thread's network namespace
	if err == nil && string(bytes.TrimSpace(b)) == "1" {
		return true, nil
	}
	return false, wont
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
