// Package sdnotify sends messages to systemd, by the protocol of sd_notify(3).
package sdnotify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// answerTime is how long systemd is waited for, which reads its socket at once unless
// it is stopped or nobody reads there.
const answerTime = time.Second

// ErrNoSocket: the process wasn't started by systemd, or not by a unit that listens to it.
var ErrNoSocket = errors.New("NOTIFY_SOCKET is not set")

// Send sends a message, such as "READY=1", with duplicates of descriptors.
func Send(message string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	switch {
	case path == "":
		return ErrNoSocket
	case path[0] != '/' && path[0] != '@': // as sd_notify has it; vsock is for virtual machines
		return fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract name", path)
	case strings.ContainsRune(path, 0) || len(path) > 107:
		return fmt.Errorf("NOTIFY_SOCKET=%q is no name of a unix socket", path)
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(answerTime))
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	werr := raw.Write(func(fd uintptr) bool { // WriteMsgUnix refuses connected sockets
		err = syscall.Sendmsg(int(fd), []byte(message), rights, nil, 0)
		return err != syscall.EAGAIN
	})
	if err := errors.Join(werr, os.NewSyscallError("sendmsg", err)); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	return nil
}

// Barrier returns when systemd has read all that was sent before it.
func Barrier() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = Send("BARRIER=1", int(w.Fd()))
	w.Close()
	if err != nil {
		return err
	}
	r.SetReadDeadline(time.Now().Add(answerTime))
	if _, err := r.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("NOTIFY_SOCKET: nobody has read it for %v", answerTime)
	}
	return nil // systemd has closed the other end
}
