//go:build !unix

package lblisten

// What systems other than unix don't do with a listening socket.

import (
	"net"
	"syscall"
)

const canSetBacklog = false

func setBacklog(ln net.Listener, n int) error { return ErrUnsupported }

// isV6Only is asked nowhere: see isDualStack.
func isV6Only(fd uintptr) bool { return false }

// setV6Only: no kernel balances here.
func setV6Only(fd uintptr, only bool) {}

// hasKeepAlive: nobody else's socket is ever received here.
func hasKeepAlive(fd uintptr) bool { return false }

// readable is asked only about sockets of a kernel's group; there are none.
func readable(fd uintptr) bool { return false }

// control runs f on the descriptor of a socket, and returns its error.
func control(c syscall.RawConn, f func(fd uintptr) error) error { return ErrUnsupported }
