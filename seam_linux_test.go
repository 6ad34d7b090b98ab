package lblisten

// The seam on Linux: steering, and the look that is taken once a second.

import (
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
)

// everySecond has f called once a second until stop, as addresses are looked after.
func everySecond(f func()) (stop func()) { return keepLooking(f) }

// lookedAfter is how many addresses are looked after once a second.
func lookedAfter() int {
	looking.mu.Lock()
	defer looking.mu.Unlock()
	return len(looking.looks)
}

// lookNow does for a group's address what is done once a second.
func lookNow(g *Group) { g.g.k.tick() }

// retireNow closes the sockets of closed members that nothing is steered to, as if
// they had been quiet for long enough. It may run beside the last Close.
func retireNow(g *Group) {
	g.g.mu.Lock()
	if g.g.dying {
		g.g.mu.Unlock()
		return
	}
	k := g.g.k
	k.steer()
	k.since = k.since.Add(-retireAfter)
	for _, w := range *g.g.shared.Load() {
		w.used.Store(-int64(time.Hour))
	}
	g.g.mu.Unlock()
	k.retire()
}

// steersByProgram tells whether a program of the package steers at a group's
// address now.
func steersByProgram(g *Group) bool {
	g.g.mu.Lock()
	defer g.g.mu.Unlock()
	return !g.g.k.since.IsZero()
}

// steersByTable tells whether the program that steers, when it is in force, looks
// sockets up in a table; otherwise it is a classic one, that takes no privilege.
func steersByTable(g *Group) bool { return g.g.k.table != nil }

// sampling tells whether the lengths of the queues are looked at for SteerLoad.
func sampling(g *Group) bool { return !g.g.k.sampler.asleep.Load() }

// failBPF makes bpf(2) fail with err in this process until the test ends, as if
// nothing were known of this kernel yet, and counts the calls.
func failBPF(t testing.TB, err error) (calls *atomic.Int64) {
	t.Helper()
	calls = new(atomic.Int64)
	bpfBack := set(&bpf, func(int, unsafe.Pointer, uintptr) (int, error) { calls.Add(1); return -1, err })
	neverBack := set(&migration.never, nil)
	t.Cleanup(func() {
		bpfBack()
		neverBack()
	})
	return calls
}
