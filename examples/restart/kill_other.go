//go:build !linux

package main

import (
	"errors"
	"syscall"
)

// canFreeze: what a process has accepted is only told on Linux.
const canFreeze = false

// dieWithDriver: there is no such thing; a server ends with its standard input.
var dieWithDriver *syscall.SysProcAttr

func freeze(pid int, addr string) (ports []int, err error) { return nil, errors.ErrUnsupported }
