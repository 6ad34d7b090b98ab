//go:build unix

package main

import (
	"os"
	"syscall"
)

var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM}

func runs(pid int) bool { return pid != 0 && syscall.Kill(pid, 0) == nil }
