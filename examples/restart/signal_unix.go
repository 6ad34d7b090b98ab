//go:build unix

package main

import "syscall"

// hangup has tableflip replace a process.
const hangup = syscall.SIGHUP
