package lblisten

// Linux: how a socket joins the kernel's group, what it is besides its address,
// and how long its queue is.

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// system: past the limit of sockets in a group listen fails with ENOMEM, so nobody
// is starved.
var system = capabilities{option: "SO_REUSEPORT", groupLimit: maxMembers, pinned: true}

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

// inheritsOptions is whether an accepted socket has the keep-alive of the listening one,
// which Linux always did. In gVisor it has none, and package net sets it on every
// connection. A kernel that claims to have reuseport programs, and hasn't, is not Linux.
func inheritsOptions() bool { return noPrograms() == nil }

// factsOf tells what a socket is besides its address.
func factsOf(fd uintptr) (is facts) {
	var err error
	if is.space, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		is.space = threadSpace() // before Linux 5.14
	}
	if is.device, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX); err != nil {
		is.device = deviceByName(fd) // before Linux 5.1
	}
	is.only = isV6Only(fd)
	return is
}

// threadSpace returns the inode of the network namespace of the calling thread, in
// which a socket that it has just made is.
func threadSpace() uint64 {
	var st unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &st) != nil {
		return 0
	}
	return st.Ino
}

// deviceByName returns the index of the interface that a socket is bound to. One
// that is no more has none, and so no socket can be taken for one of it: -1.
func deviceByName(fd uintptr) int {
	name, err := unix.GetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
	if err != nil || name == "" {
		return 0
	}
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return -1
	}
	return ifi.Index
}

// queueLength returns the number of connections that are queued in a listening
// socket, and the limit in force. Both are fields of TCP_INFO that mean
// something else on a connection (tcp_get_info in net/ipv4/tcp.c). What speaks Linux and
// isn't it leaves them 0 (gVisor): a limit of 0 tells nothing.
func queueLength(fd uintptr) (queued, backlog int) {
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil || info.Unacked == 0 && info.Sacked == 0 {
		return -1, -1
	}
	return int(info.Unacked), int(info.Sacked)
}
