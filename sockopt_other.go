//go:build !linux && !freebsd && !dragonfly

package lblisten

// Systems whose kernel doesn't balance between sockets: the dispatcher does.

import (
	"errors"
	"runtime"
)

var system = capabilities{option: "kernel", groupLimit: maxMembers}

// joinKernelGroup always fails: with SO_REUSEPORT one socket gets everything on
// macOS, NetBSD and OpenBSD, other systems have no such option, or balance only
// under settings that Go doesn't make (Solaris, AIX).
func joinKernelGroup(fd uintptr) error {
	return errors.New("the kernel of " + runtime.GOOS + " does not balance between listening sockets")
}

func isBalanced(fd uintptr) bool { return false }

func factsOf(fd uintptr) facts { return facts{only: isV6Only(fd)} }

// kernelInherits is not asked: the kernel balances nothing.
func kernelInherits() error { return ErrUnsupported }

// queueLength: the system doesn't tell.
func queueLength(fd uintptr) (queued, backlog int) { return -1, -1 }
