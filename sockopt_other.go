//go:build !linux && !freebsd && !dragonfly

package lblisten

// Systems whose kernel doesn't balance between sockets: the dispatcher does.

import (
	"errors"
	"runtime"
)

const (
	kernelOption   = "kernel"
	groupLimit     = maxMembers
	splitDualStack = false
)

// joinKernelGroup always fails: with SO_REUSEPORT one socket gets everything on
// macOS, NetBSD and OpenBSD, other systems have no such option, or balance only
// under settings that Go doesn't make (Solaris, AIX).
func joinKernelGroup(fd uintptr) error {
	return errors.New("the kernel of " + runtime.GOOS + " does not balance between listening sockets")
}

func isBalanced(fd uintptr) bool { return false }

const canPin = false

// letKernelInherit and kernelInherits are not asked: the kernel balances nothing.
func letKernelInherit(fd uintptr, pinned string) (done func(), wont, err error) {
	return nil, nil, ErrUnsupported
}

func kernelInherits(wont error) (bool, error) { return false, wont }

func keepLooking(func()) (stop func()) { return nil }

// queueLength: the system doesn't tell.
func queueLength(fd uintptr) (queued, backlog int) { return -1, -1 }
