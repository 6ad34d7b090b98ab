package main

// The clients: connections that fill a queue, and a loop that connects as fast as
// it can. They reset instead of closing, so that no port waits in TIME_WAIT and
// the client's ports don't run out.

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// queueSize connections wait before accepting is measured.
var queueSize = min(512, maxQueue())

// openClient makes a socket that resets when it is closed.
func openClient(flags int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_SYNCNT, 2) // give up after some 7 s
	return fd, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// connectAndSend sends a byte too: a listener with TCP_DEFER_ACCEPT, as
// fasthttp's, waits for one.
func connectAndSend(fd int, sa unix.Sockaddr) error {
	if err := unix.Connect(fd, sa); err != nil {
		return os.NewSyscallError("connect", err)
	}
	_, err := unix.Write(fd, []byte{'x'})
	return os.NewSyscallError("write", err)
}

// fill makes n connections wait for o, and returns the clients' sockets.
func fill(o *opened, n int) (clients []int, err error) {
	sa := o.sockaddr()
	for range n {
		fd, err := openClient(0)
		if err != nil {
			closeAll(clients)
			return nil, err
		}
		clients = append(clients, fd)
		if err := connectAndSend(fd, sa); err != nil {
			closeAll(clients)
			return nil, err
		}
	}
	// All handshakes are done in the queue's view too?
	for end := time.Now().Add(5 * time.Second); ; {
		waiting, err := o.queued()
		if err == nil && waiting != n && time.Now().After(end) {
			err = fmt.Errorf("%d of %d connections wait", waiting, n)
		}
		if err != nil {
			closeAll(clients)
			return nil, err
		}
		if waiting == n {
			return clients, nil
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// shares is how many connections wait for each listener; of one socket that all
// share, an even share.
func (o *opened) shares() ([]int, error) {
	n := make([]int, len(o.lns))
	if !o.ownSockets() {
		total, err := queued(o.lns[0])
		for i := range n {
			n[i] = (total + i) / len(n)
		}
		return n, err
	}
	for i, ln := range o.lns {
		var err error
		if n[i], err = queued(ln); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (o *opened) queued() (int, error) {
	if o.rawFD >= 0 {
		return queuedFD(o.rawFD)
	}
	shares, err := o.shares()
	total := 0
	for _, n := range shares {
		total += n
	}
	return total, err
}

// flood keeps width connections to an address in flight until a time: connect,
// wait for the server to close, reset, and again. It is one thread with an epoll
// of its own, so that the client costs as little as it can.
func flood(sa *unix.SockaddrInet4, width int, until time.Time) error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	defer unix.Close(ep)
	open := make(map[int]bool)
	defer func() {
		for fd := range open {
			unix.Close(fd)
		}
	}()
	connect := func() error {
		fd, err := openClient(unix.SOCK_NONBLOCK)
		if err != nil {
			return err
		}
		open[fd] = true
		if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
			return os.NewSyscallError("connect", err)
		}
		return os.NewSyscallError("epoll_ctl", unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd,
			&unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP, Fd: int32(fd)}))
	}
	for range width {
		if err := connect(); err != nil {
			return err
		}
	}
	events := make([]unix.EpollEvent, width)
	for last := time.Now(); time.Now().Before(until); {
		n, err := unix.EpollWait(ep, events, 10)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("epoll_wait", err)
		}
		if n > 0 {
			last = time.Now()
		} else if time.Since(last) > 5*time.Second {
			return fmt.Errorf("no connection was served for 5 s")
		}
		for _, e := range events[:max(0, n)] {
			unix.Close(int(e.Fd))
			delete(open, int(e.Fd))
			if err := connect(); err != nil {
				return err
			}
		}
	}
	return nil
}
