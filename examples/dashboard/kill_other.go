//go:build !linux

package main

import (
	"errors"
	"syscall"
)

const canFreeze = false

// dieWithParent: there is no such thing; a worker ends with its standard input.
var dieWithParent *syscall.SysProcAttr

// freeze is only on Linux. Elsewhere the records have to do: a connection that a
// killed worker had accepted and not yet recorded counts as lost, and the page
// says that the counts are bounds.
func freeze(pid int, addr string) (ports []int, err error) { return nil, errors.ErrUnsupported }
