//go:build !linux

package child

import (
	"errors"
	"syscall"
)

// CanFreeze tells whether this system tells what a process has accepted.
const CanFreeze = false

// DieWithParent: there is no such thing here; a child ends with its standard input.
var DieWithParent *syscall.SysProcAttr

// Freeze is only on Linux.
func Freeze(pid int, addr string) (ports []int, err error) { return nil, errors.ErrUnsupported }
