//go:build !linux && !freebsd

package lblisten

// Systems on which it isn't known that an accepted socket inherits the
// keep-alive of the listening one: package net sets it on every connection.

import "net"

func lean(lc net.ListenConfig) (net.ListenConfig, func(fd uintptr)) { return lc, func(uintptr) {} }

func adoptKeepAlive(fd uintptr, lc net.ListenConfig) {}
