//go:build !unix

package main

import "os"

// hangup is never sent here: tableflip is for unix.
var hangup = os.Interrupt
