//go:build !linux

package lblisten

import "runtime"

// tellsQueues is whether the system tells how many connections are queued in a socket.
func tellsQueues() bool { return runtime.GOOS == "freebsd" }

// dontLookAgain: nobody looks again on this system.
func dontLookAgain(g *Group) {}
