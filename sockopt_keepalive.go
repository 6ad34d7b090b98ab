//go:build linux || freebsd

package lblisten

// Systems on which an accepted socket inherits the keep-alive of the listening one, unless
// inheritsOptions finds out that it doesn't. There it is set once on the listening socket,
// instead of by package net on every connection: an Accept costs 4 system calls so, not 8.

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lean takes the keep-alive out of lc, and returns what sets it on a listening
// socket. What lc leaves alone stays what the user's Control has made of it.
func lean(lc net.ListenConfig) (net.ListenConfig, func(fd uintptr)) {
	if !inheritsOptions() {
		return lc, func(uintptr) {}
	}
	config, set := keepAliveAsked(lc)
	lc.KeepAlive, lc.KeepAliveConfig = -1, net.KeepAliveConfig{}
	return lc, func(fd uintptr) {
		if set {
			setKeepAlive(int(fd), config)
		}
	}
}

// keepAliveOf reads the keep-alive of a listening socket.
func keepAliveOf(fd uintptr, lc net.ListenConfig) keepAlive {
	if !inheritsOptions() {
		config, _ := keepAliveAsked(lc)
		return config
	}
	get := func(opt int) int {
		n, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, opt)
		return n
	}
	return keepAlive{
		Enable:   hasKeepAlive(fd),
		Idle:     time.Duration(get(unix.TCP_KEEPIDLE)) * time.Second,
		Interval: time.Duration(get(unix.TCP_KEEPINTVL)) * time.Second,
		Count:    get(unix.TCP_KEEPCNT),
	}
}

// adoptKeepAlive gives a listening socket the keep-alive that a new one would have, or
// returns what gives it to each connection.
func adoptKeepAlive(fd uintptr, k keepAlive) (finish func(net.Conn)) {
	if !inheritsOptions() {
		return giveKeepAlive(k)
	}
	on := 0
	if k.Enable {
		on = 1
	}
	unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, on)
	setKeepAliveTimes(int(fd), k)
	return nil
}

// setKeepAlive does what net.TCPConn.SetKeepAliveConfig does: 0 is package net's
// default, a negative value leaves the system's. As there, what the system
// refuses ends it, and as in package net's Accept nobody hears of it.
func setKeepAlive(fd int, config net.KeepAliveConfig) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1) == nil {
		setKeepAliveTimes(fd, config)
	}
}

func setKeepAliveTimes(fd int, config net.KeepAliveConfig) {
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
		set        bool
		opt, value int
	}{
		{config.Idle >= 0, unix.TCP_KEEPIDLE, seconds(config.Idle)},
		{config.Interval >= 0, unix.TCP_KEEPINTVL, seconds(config.Interval)},
		{count > 0, unix.TCP_KEEPCNT, count},
	} {
		if o.set && unix.SetsockoptInt(fd, unix.IPPROTO_TCP, o.opt, o.value) != nil {
			return
		}
	}
}
