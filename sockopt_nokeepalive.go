//go:build !linux && !freebsd

package lblisten

// Systems on which it isn't known that an accepted socket inherits the
// keep-alive of the listening one: package net sets it on every connection.

import "net"

func lean(lc net.ListenConfig) (net.ListenConfig, func(fd uintptr)) { return lc, func(uintptr) {} }

// keepAliveOf returns what package net gives to connections of lc. Where lc leaves
// them alone, it is as the user's Control has set it, with the system's times.
func keepAliveOf(fd uintptr, lc net.ListenConfig) keepAlive {
	config, set := keepAliveAsked(lc)
	if !set {
		config = net.KeepAliveConfig{Enable: hasKeepAlive(fd), Idle: -1, Interval: -1, Count: -1}
	}
	return config
}

// adoptKeepAlive: what package net sets on each connection is in the listener.
func adoptKeepAlive(fd uintptr, k keepAlive) (finish func(net.Conn)) { return nil }
