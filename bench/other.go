//go:build !linux

package main

// On other systems there is nothing to measure: thread CPU clocks, queue lengths
// and half of the contenders are Linux's.

import (
	"errors"
	"runtime"
)

var unsupported = errors.New("the suite measures on Linux only, and this is " + runtime.GOOS)

var measurements []measurement

func isChild() bool { return false }

func child() {}

func thisMachine() Machine { return Machine{} }
