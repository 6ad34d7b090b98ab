package main

import (
	"net"

	"golang.org/x/sys/unix"
)

// queued asks the kernel how many connections wait for a listener that doesn't
// tell; -1 if it can't.
func queued(ln net.Listener) int {
	t, ok := ln.(*net.TCPListener)
	if !ok {
		return -1
	}
	conn, err := t.SyscallConn()
	if err != nil {
		return -1
	}
	n := -1
	conn.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			n = int(info.Unacked) // of a listening socket, the length of its queue
		}
	})
	return n
}
