//go:build solaris || illumos

package main

import (
	"errors"
	"net"
)

// listenReuseport: go-reuseport v0.4.0 doesn't compile here.
func listenReuseport(addr string) (net.Listener, error) { return nil, errors.ErrUnsupported }
