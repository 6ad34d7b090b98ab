package lblisten

// The once-a-second look. Kernels from 5.14 that migrate, but lack the fix of 2026
// ("tcp: call sk_data_ready() after listener migration", CVE-2026-46015), put a
// connection into the queue of an heir and don't wake it. The kernel counts what it
// migrates. So when that count has changed, Accepts that wait although a connection is
// queued are made to look. Programs that steer are looked after then, too.

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const lookEvery = time.Second

// looking is what the look is about. All addresses share a goroutine for it, and that
// sleeps in a thread of its own: as long as anything else than Accept waits for the
// runtime, a timer or a descriptor, an idle thread waits in epoll for it and is woken by
// each connection, which cost a server of one accept loop some 5 % of its CPU.
var looking struct {
	mu sync.Mutex  // guards what follows, for instants; a leaf
	at []*lookedAt // copied when it changes
	by *lookout    // nil if there is no address
}

// A lookedAt is in the look: an address, or something that is to be called.
type lookedAt struct {
	a     *address // nil for none
	space *netspace
	call  func()     // nil for nothing
	units func() int // of lookEvery until the next look, if nobody wants it sooner
}

// A lookout is the goroutine.
type lookout struct {
	wake int         // an eventfd that ends it, which it closes; -1 if none was to be had
	quit atomic.Bool // it is to end
}

// keepLooking has the look include an address, until stop.
func keepLooking(a *address, space *netspace) (stop func()) {
	l := lookedAt{a: a, space: space, units: func() int { return 1 }}
	switch {
	case a.steering.byProgram():
		l.call = func() {
			if a.tryTurn() {
				a.k.tick()
				a.giveTurn()
			}
		}
	case !space.canMigrate():
		return func() {}
	case a.h != nil:
		l.units = a.h.units
	}
	return l.keep()
}

// callNowAndThen has the look call something, until stop; it may be in that call then.
func callNowAndThen(call func(), units func() int) (stop func()) {
	l := lookedAt{call: call, units: units}
	return l.keep()
}

func (l *lookedAt) keep() (stop func()) {
	looking.mu.Lock()
	defer looking.mu.Unlock()
	if looking.by == nil {
		by := new(lookout)
		var err error
		if by.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			by.wake = -1 // the end takes until the next look
		}
		looking.by = by
		go by.run()
	}
	looking.at = append(slices.Clip(looking.at), l)
	return func() {
		looking.mu.Lock()
		defer looking.mu.Unlock()
		looking.at = slices.DeleteFunc(slices.Clone(looking.at), func(x *lookedAt) bool { return x == l })
		if len(looking.at) == 0 {
			looking.by.quit.Store(true)
			unix.Write(looking.by.wake, []byte{1, 1, 1, 1, 1, 1, 1, 1}) // any number but 0
			looking.by = nil
		}
	}
}

func (by *lookout) run() {
	var s sight
	for next := time.Now().Add(lookEvery); !by.quit.Load(); {
		wait := time.Until(next).Milliseconds() + 1
		fds := []unix.PollFd{{Fd: int32(by.wake), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(0, int(wait)))
		switch {
		case err == unix.EINTR || fds[0].Revents&unix.POLLIN != 0:
			continue
		case n != 0: // it is forbidden, or somebody has closed the descriptor
			time.Sleep(lookEvery)
		}
		looking.mu.Lock()
		at := looking.at
		looking.mu.Unlock()
		s.look(at)
		units := math.MaxInt16
		for _, l := range at {
			if l.call != nil {
				l.call()
			}
			units = min(units, l.units())
		}
		next = time.Now().Add(time.Duration(units) * lookEvery)
	}
	looking.mu.Lock() // whoever ends it writes under it
	defer looking.mu.Unlock()
	unix.Close(by.wake)
}

// A sight is the sockets of one look in which somebody waits for a connection. Their
// numbers may be others' by the time: whoever is told to look in vain does no harm.
type sight struct {
	fds []unix.PollFd
	who []waiter
}

// A waiter is an *owner or a *watch.
type waiter interface{ lookAgain() }

// look has everybody look who waits although a connection is queued, where the kernel
// has migrated one since the last look.
func (s *sight) look(at []*lookedAt) {
	s.fds, s.who = s.fds[:0], s.who[:0]
	moved := make(map[*netspace]bool)
	for _, l := range at {
		if l.a == nil {
			continue
		}
		if _, asked := moved[l.space]; !asked {
			moved[l.space] = l.space.hasMigrated()
		}
		if !moved[l.space] {
			continue
		}
		a := l.a
		for _, l := range *a.members.Load() {
			if o := l.role.(*owner); o.waiting() > 0 {
				s.add(o.s, o)
			}
		}
		for _, w := range *a.shared.Load() {
			if !w.ready.Load() {
				s.add(w.s, w)
			}
		}
	}
	const most = 1024 // the soft limit of descriptors, which is that of poll(2) too
	for i := 0; i < len(s.fds); i += most {
		some := s.fds[i:min(i+most, len(s.fds))]
		n, err := unix.Poll(some, 0)
		for j := range some {
			if some[j].Revents != 0 || err != nil && isQueued(some[j].Fd) {
				s.who[i+j].lookAgain()
				n--
			}
			if n == 0 {
				break
			}
		}
	}
	clear(s.who) // they may be long gone when the next look begins
}

func (s *sight) add(sock *socket, who waiter) {
	s.fds = append(s.fds, unix.PollFd{Fd: int32(sock.fd), Events: unix.POLLIN})
	s.who = append(s.who, who)
}

// isQueued is for where a filter of system calls forbids poll(2).
func isQueued(fd int32) bool {
	queued, _ := queueLength(uintptr(fd))
	return queued > 0
}
