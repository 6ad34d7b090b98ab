package lblisten

// The seam on Linux: steering, and the look that is taken once a second.

import (
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// everySecond has f called once a second until stop, as an Accept is that waits
// although a connection is queued.
func everySecond(f func()) (stop func()) {
	file, err := os.Open(os.DevNull) // always readable
	if err != nil {
		panic(err)
	}
	a := new(address)
	o := &owner{a: a, s: &socket{ln: deadlines(f)}}
	o.s.fd = file.Fd()
	o.inside.Add(1)
	a.members.Store(&[]*Listener{{a: a, role: o}})
	a.shared.Store(new([]*watch))
	stopLooking := keepLooking(a, &netspace{counts: -1})
	return func() {
		stopLooking()
		file.Close()
	}
}

// deadlines calls itself for each deadline.
type deadlines func()

func (f deadlines) SetDeadline(time.Time) error         { f(); return nil }
func (deadlines) Accept() (net.Conn, error)             { panic("unused") }
func (deadlines) Close() error                          { panic("unused") }
func (deadlines) Addr() net.Addr                        { panic("unused") }
func (deadlines) File() (*os.File, error)               { panic("unused") }
func (deadlines) SyscallConn() (syscall.RawConn, error) { panic("unused") }

// lookedAfter is how many addresses are looked after once a second.
func lookedAfter() int {
	looking.mu.Lock()
	defer looking.mu.Unlock()
	return len(looking.at)
}

// lookNow does for a group's address what is done once a second.
func lookNow(g *Group) {
	g.a.turn <- struct{}{}
	defer g.a.giveTurn()
	g.a.k.tick()
}

// pretendMigration has the kernel's count of migrations have changed since the last
// look.
func pretendMigration(g *Group) { g.a.k.space.before.Add(1) }

// retireNow closes the sockets of closed members that nothing is steered to, as if
// they had been quiet for long enough. It may run beside the last Close.
func retireNow(g *Group) {
	a := g.a
	a.turn <- struct{}{}
	defer a.giveTurn()
	if a.hasEnded() {
		return
	}
	a.k.since = a.k.since.Add(-retireAfter)
	for _, w := range *a.shared.Load() {
		w.used.Store(-int64(time.Hour))
	}
	a.k.tick()
}

// migrates tells whether a program is attached at a group's address that lets the kernel
// inherit, whether or not another process is there to.
func migrates(g *Group) bool {
	switch g.a.k.now.Load().program {
	case migrating, byTable, pinned:
		return true
	}
	return false
}

// steersByTable tells whether the program that steers, when it is in force, looks
// sockets up in a table; otherwise it is a classic one, that takes no privilege.
func steersByTable(g *Group) bool { return g.a.k.table != nil }

// sampling tells whether the lengths of the queues are looked at for SteerLoad.
func sampling(g *Group) bool { return !g.a.k.sampler.asleep.Load() }

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

// dontLookAgain takes a group's address out of the once-a-second look.
func dontLookAgain(g *Group) {
	g.a.turn <- struct{}{}
	defer g.a.giveTurn()
	g.a.k.stop()
	g.a.k.stop = func() {}
}
