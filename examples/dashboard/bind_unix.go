//go:build unix

package main

import "syscall"

// bind returns a net.Dialer's Control that binds the client to a port of its own
// and tells it: of a connection that is reset before Dial returns, nothing else
// would.
func bind(port *int) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		failed := c.Control(func(fd uintptr) {
			if err = syscall.Bind(int(fd), &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
				return
			}
			var at syscall.Sockaddr
			if at, err = syscall.Getsockname(int(fd)); err == nil {
				*port = at.(*syscall.SockaddrInet4).Port
			}
		})
		if failed != nil {
			return failed
		}
		return err
	}
}
