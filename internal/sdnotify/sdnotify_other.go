//go:build !linux

// Package sdnotify sends messages to systemd, by the protocol of sd_notify(3).
package sdnotify

import "errors"

// ErrNoSocket: the process wasn't started by systemd.
var ErrNoSocket = errors.New("this system has no systemd")

// Send sends a message.
func Send(string, ...int) error { return ErrNoSocket }
