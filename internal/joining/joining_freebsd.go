package joining

import (
	"errors"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Refuses tells whether such a socket turns connections away.
func Refuses() bool { return refuses() }

// TurnedAway tells whether an error is what such a socket answers a client with, in this
// kernel: a SYN that meets it is refused, the last packet of a handshake is reset.
func TurnedAway(err error) bool {
	var op *net.OpError
	dials := errors.As(err, &op) && op.Op == "dial"
	return refuses() && (errors.Is(err, unix.ECONNREFUSED) || dials && errors.Is(err, unix.ECONNRESET))
}

var refuses = sync.OnceValue(func() bool {
	at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	for i := range 5 { // the last one doesn't listen
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return true
		}
		defer unix.Close(fd)
		for _, opt := range []int{unix.SO_REUSEPORT, unix.SO_REUSEPORT_LB} {
			if unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1) != nil {
				return true
			}
		}
		if unix.Bind(fd, at) != nil || i < 4 && unix.Listen(fd, 64) != nil {
			return true
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			return true
		}
		at = sa.(*unix.SockaddrInet4)
	}
	for range 100 {
		c, err := net.DialTimeout("tcp4", (&net.TCPAddr{IP: at.Addr[:], Port: at.Port}).String(), time.Second)
		if err != nil {
			return true
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	return false
})
