//go:build !solaris && !illumos

package main

import (
	"net"

	"github.com/libp2p/go-reuseport"
)

// listenReuseport opens one listener of go-reuseport, the peer.
func listenReuseport(addr string) (net.Listener, error) { return reuseport.Listen("tcp", addr) }
