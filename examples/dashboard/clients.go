package main

// The clients: each dials, sends a byte, and waits until it comes back.

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"
)

// patience is how long a client waits to be connected, and then for its answer.
// A lost connection shows at once, as a reset, on most systems; this is for one
// that nobody ever takes, and outlasts a stall.
var patience = 15 * time.Second

// outcome is what became of a client.
type outcome int

const (
	served outcome = iota
	refused
	unanswered // lost, unless a process had accepted it
	died       // with the process that had accepted it
	failed     // it could not dial, or a living worker had accepted it
)

// exchange is a client's whole life. The port is the one it had, if that is known.
func exchange(ctx context.Context, addr string) (o outcome, port int, err error) {
	d := net.Dialer{Timeout: patience, KeepAlive: -1, Control: bind(&port)}
	conn, err := d.DialContext(ctx, "tcp4", addr)
	if err != nil {
		// By the text, because the errors of plan9 and Windows have no names in
		// package syscall.
		var netErr net.Error
		switch text := err.Error(); {
		case strings.Contains(text, "refused"):
			return refused, port, err
		case errors.As(err, &netErr) && netErr.Timeout(),
			strings.Contains(text, "reset"): // connected, but gone before Dial returned
			return unanswered, port, err
		}
		return failed, port, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	port = conn.LocalAddr().(*net.TCPAddr).Port
	// A reset instead of a goodbye: TIME_WAIT would keep the port for a minute,
	// and they would run out.
	conn.(*net.TCPConn).SetLinger(0)
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write([]byte{'?'}); err != nil {
		return unanswered, port, err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return unanswered, port, err
	}
	return served, port, nil
}

// innermost returns the error without the addresses around it.
func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
