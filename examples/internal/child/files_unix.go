//go:build unix

package child

import (
	"math"
	"syscall"
)

// FileLimit is the most files that this process, and each that it starts, can
// open. Package os has raised the limit as far as it goes.
func FileLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || uint64(l.Cur) > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(l.Cur)
}
