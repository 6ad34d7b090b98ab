//go:build !unix || solaris

package lblisten

import "syscall"

const canReusePort = false

// reusePort is not called here.
func reusePort(network, address string, c syscall.RawConn) error { return ErrUnsupported }
