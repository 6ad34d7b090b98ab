package lblisten

// FreeBSD: how a socket joins the kernel's group, and how long its queue is.

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// system: the limit is INPCBLBGROUP_SIZMAX (sys/netinet/in_pcb.c); the socket past it
// binds and listens without an error and never gets a connection. A dual-stack socket
// never joins a group, the last one bound gets everything.
var system = capabilities{option: "SO_REUSEPORT_LB", groupLimit: 256, splitDualStack: true}

const canReusePort = true

// reusePort sets SO_REUSEPORT alone. go-reuseport's Control would set
// SO_REUSEPORT_LB too, which makes the socket a balanced one.
func reusePort(network, address string, c syscall.RawConn) error {
	return control(c, func(fd uintptr) error { return setBool(fd, "SO_REUSEPORT", unix.SO_REUSEPORT) })
}

// joinKernelGroup makes a socket that is not bound yet a member of the group of
// the address it will be bound to. An error means that this kernel can't.
// SO_REUSEPORT_LB is there from FreeBSD 12 and is what balances. SO_REUSEPORT
// beside it keeps other users' processes out of a group on a wildcard address.
// Both must be set before bind: later they report success and do nothing.
func joinKernelGroup(fd uintptr) error {
	if err := setBool(fd, "SO_REUSEPORT_LB", unix.SO_REUSEPORT_LB); err != nil {
		return err
	}
	return setBool(fd, "SO_REUSEPORT", unix.SO_REUSEPORT)
}

func setBool(fd uintptr, name string, option int) error {
	return os.NewSyscallError("setsockopt "+name, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, 1))
}

// isBalanced tells whether a socket has joined so.
func isBalanced(fd uintptr) bool {
	on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT_LB)
	return err == nil && on != 0
}

func factsOf(fd uintptr) facts { return facts{only: isV6Only(fd)} }

// kernelInherits tells why the kernel doesn't give the queue of a process that dies
// to another.
func kernelInherits() error {
	return errors.New("FreeBSD's kernel resets the queue of a process that dies")
}

// queueLength returns the number of connections that are queued in a listening
// socket, and the limit in force.
func queueLength(fd uintptr) (queued, backlog int) {
	const soListenQLimit = 0x1011 // SO_LISTENQLIMIT in sys/socket.h; x/sys has it as well
	queued, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_LISTENQLEN)
	if err != nil {
		return -1, -1
	}
	backlog, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, soListenQLimit)
	if err != nil {
		return -1, -1
	}
	return queued, backlog
}

// inheritsOptions: an accepted socket has the keep-alive of the listening one.
func inheritsOptions() bool { return true }
