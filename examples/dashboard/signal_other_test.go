//go:build !unix

package main

import "os"

// Not reached: TestEnd needs several processes.
var endSignals []os.Signal

func runs(pid int) bool { return false }
