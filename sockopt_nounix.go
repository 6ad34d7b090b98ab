//go:build !unix

package lblisten

// What systems other than unix don't do with a listening socket.

import "net"

const canSetBacklog = false

func setBacklog(ln net.Listener, n int) error { return ErrUnsupported }

// readable is asked only about sockets of a kernel's group; there are none.
func readable(fd uintptr) bool { return false }

// isPassing tells whether a failed accept is worth trying again.
func isPassing(err error) bool { return isTemporary(err) }
