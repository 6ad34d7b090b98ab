package lblisten

// The once-a-second look.

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// lookAgainEvery is how often members that wait are made to look at their
// sockets. Kernels from 5.14 that migrate, but lack the fix of 2026 ("tcp: call
// sk_data_ready() after listener migration"), don't wake who gets a connection
// that way.
const lookAgainEvery = time.Second

// keepLooking calls look every lookAgainEvery until stop. All groups share a
// goroutine for it, and that sleeps in a thread of its own: as long as anything
// else than Accept waits for the runtime, a timer or a descriptor, an idle thread
// waits in epoll for it and is woken by each connection, which cost a server of
// one accept loop some 5 % of its CPU.
func keepLooking(look func()) (stop func()) {
	looking.mu.Lock()
	defer looking.mu.Unlock()
	if len(looking.looks) == 0 {
		looking.wake, _ = unix.Eventfd(0, unix.EFD_CLOEXEC) // without it, -1, the end takes until the next look
		looking.quit = new(atomic.Bool)
		go keepCalling(looking.wake, looking.quit)
	}
	looking.looks[&look] = struct{}{}
	return func() {
		looking.mu.Lock()
		defer looking.mu.Unlock()
		delete(looking.looks, &look)
		if len(looking.looks) == 0 {
			looking.quit.Store(true)
			unix.Write(looking.wake, []byte{1, 1, 1, 1, 1, 1, 1, 1}) // any number but 0
		}
	}
}

var looking = struct {
	mu    sync.Mutex
	looks map[*func()]struct{}
	wake  int          // an eventfd, which keepCalling closes
	quit  *atomic.Bool // keepCalling is to end
}{looks: make(map[*func()]struct{})}

func keepCalling(wake int, quit *atomic.Bool) {
	for next := time.Now().Add(lookAgainEvery); !quit.Load(); {
		wait := time.Until(next).Milliseconds() + 1
		fds := []unix.PollFd{{Fd: int32(wake), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(0, int(wait)))
		switch {
		case err == unix.EINTR || fds[0].Revents&unix.POLLIN != 0:
			continue
		case n != 0: // it is forbidden, or somebody has closed the descriptor
			time.Sleep(lookAgainEvery)
		}
		next = time.Now().Add(lookAgainEvery)
		looking.mu.Lock()
		looks := slices.Collect(maps.Keys(looking.looks))
		looking.mu.Unlock()
		for _, look := range looks {
			(*look)()
		}
	}
	looking.mu.Lock() // who ends it writes under it
	defer looking.mu.Unlock()
	unix.Close(wake)
}
