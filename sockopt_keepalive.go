//go:build linux || freebsd

package lblisten

// Systems on which an accepted socket inherits the keep-alive of the listening
// one. There it is set once on the listening socket, instead of by package net
// on every connection: an Accept costs 4 system calls so, not 8.

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lean takes the keep-alive out of lc, and returns what sets it on a listening
// socket.
func lean(lc net.ListenConfig) (net.ListenConfig, func(fd uintptr)) {
	config := keepAliveOf(lc)
	lc.KeepAlive, lc.KeepAliveConfig = -1, net.KeepAliveConfig{}
	return lc, func(fd uintptr) {
		if config.Enable { // else it stays what the user's Control has made of it
			setKeepAlive(int(fd), config)
		}
	}
}

// adoptKeepAlive sets the keep-alive of lc on a listening socket that had another.
func adoptKeepAlive(fd uintptr, lc net.ListenConfig) {
	if config := keepAliveOf(lc); config.Enable {
		setKeepAlive(int(fd), config)
	} else {
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0)
	}
}

// setKeepAlive does what net.TCPConn.SetKeepAliveConfig does: 0 is package net's
// default, a negative value leaves the system's. As there, what the system
// refuses ends it, and as in package net's Accept nobody hears of it.
func setKeepAlive(fd int, config net.KeepAliveConfig) {
	seconds := func(d time.Duration) int {
		if d == 0 {
			d = 15 * time.Second
		}
		return int((d + time.Second - 1) / time.Second)
	}
	count := config.Count
	if count == 0 {
		count = 9
	}
	for _, o := range []struct {
		set               bool
		level, opt, value int
	}{
		{true, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{config.Idle >= 0, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(config.Idle)},
		{config.Interval >= 0, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(config.Interval)},
		{count > 0, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, count},
	} {
		if o.set && unix.SetsockoptInt(fd, o.level, o.opt, o.value) != nil {
			return
		}
	}
}
