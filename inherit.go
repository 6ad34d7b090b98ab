package lblisten

// Shared sockets: those of members that have closed while siblings live, those that
// other processes have left, and older files of a unix socket. A watch waits until
// a connection is queued, and wakes a member that waits in Accept, which comes and
// takes it. It never accepts by itself: what is queued stays in the kernel.
//
// Nothing is overlooked, because every side first says what it has, then looks at
// what the others said. A watch marks its socket as ready, then looks for an Accept
// that is counted in, and wakes it. An Accept counts itself in, then looks for a
// mark, then waits; woken, it looks again. It counts itself out, then looks for a
// mark once more: it may be the one that was woken, and wakes another one instead.
// Whoever puts a member's deadline back, which may undo a wake-up, looks afterwards.

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	// retryAfter is when a socket whose Accept failed for now (EMFILE) is offered
	// again, if no Accept has come back to it by itself.
	retryAfter = 250 * time.Millisecond

	// takeTimeout ends an accept on a socket on which a connection was queued a
	// moment ago: it can be gone only where it was reset by its client, on
	// kernels that then take it out of the queue, or where another process took it.
	takeTimeout = time.Millisecond

	// pollEvery is how often a watch looks at its socket when there is no
	// descriptor to be had for waiting.
	pollEvery = 10 * time.Millisecond
)

// inheritedFor is how long connections of a shared socket count as inherited: it is one of
// the service's then, whether a new member adopts it or not.
var inheritedFor = time.Minute

// began is what a watch counts from: a clock that is set changes nothing.
var began = time.Now()

// A watch is a socket in which no Accept waits.
type watch struct {
	s      *socket
	a      *address
	finish func(net.Conn)        // what its connections need, nil for nothing
	of     atomic.Pointer[owner] // whose companion it is; nil for any other

	since atomic.Int64  // when it was shared: ns since began
	used  atomic.Int64  // and when it was taken from last, or shared
	ready atomic.Bool   // a connection is queued; counted in a.ready
	rearm chan struct{} // the socket was found empty
	quit  chan struct{} // closed by stop
	ended chan struct{} // closed when run has returned

	taking  sync.Mutex // held by whoever takes, for takeTimeout at most; members only try it. A leaf
	stopped bool       // nobody takes any more; guarded by taking

	mu   sync.Mutex // guards file, for instants; a leaf
	file *os.File   // a duplicate of the socket, to wait on
}

// newWatch makes a watch, for share.
func newWatch(a *address, s *socket, finish func(net.Conn)) *watch {
	return &watch{s: s, a: a, finish: finish, rearm: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{})}
}

// share makes sockets shared ones: what is queued in them is to be had when it
// returns.
func (a *address) share(more ...*watch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shareLocked(more...)
}

func (a *address) shareLocked(more ...*watch) {
	shared := append(slices.Clone(*a.shared.Load()), more...)
	marked := make([]bool, len(more))
	for i, w := range more {
		w.since.Store(int64(time.Since(began)))
		w.used.Store(w.since.Load())
		if marked[i] = w.s.readable(); marked[i] {
			w.mark()
		}
	}
	a.shared.Store(&shared)
	for i, w := range more {
		go w.run(marked[i]) // only now: whoever it wakes must find it
	}
}

// inherit makes a socket of another process a shared one. It returns false if
// the address has begun to end.
func (a *address) inherit(s *socket) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.ended {
		a.shareLocked(newWatch(a, s, finishKeepAlive(a.keepAlive)))
	}
	return !a.ended
}

// adopt takes a shared socket for a new member; nil if there is none. Of a handoff's
// sockets it takes those that no other process takes. It is called with the turn.
func (a *address) adopt(ctx context.Context, network string) *socket {
	for _, w := range *a.shared.Load() {
		if w.of.Load() != nil || w.s.net != network {
			continue
		}
		p := w.s.pooled
		if p != nil && !a.h.claim(ctx, p) {
			continue // another process has it
		}
		if a.unshare(w) {
			w.s.ln.SetDeadline(time.Time{}) // that of the last take
			return w.s
		}
		if p != nil {
			a.h.giveBack(p)
		}
	}
	return nil
}

// takeBack ends the sharing of a socket that another process accepts from.
func (a *address) takeBack(p *pooled) {
	shared := *a.shared.Load()
	if i := slices.IndexFunc(shared, func(w *watch) bool { return w.s.pooled == p }); i >= 0 && a.unshare(shared[i]) {
		shared[i].s.close()
		if a.k != nil {
			a.k.drop(shared[i].s)
		}
	}
}

// unshare takes a shared socket away from the members. It returns false if somebody
// else did. When it returns nobody takes from the socket any more.
func (a *address) unshare(w *watch) bool {
	a.mu.Lock()
	before := *a.shared.Load()
	rest := slices.DeleteFunc(slices.Clone(before), func(x *watch) bool { return x == w })
	a.shared.Store(&rest)
	a.mu.Unlock()
	if len(rest) == len(before) {
		return false
	}
	w.stop()
	return true
}

// dropUnreachable closes the shared sockets of older files of a unix socket that
// nobody can reach any more: the file is gone, also by another name in the same
// directory, nothing is queued, and nothing was taken for a while. It is called with
// the turn.
func (a *address) dropUnreachable() {
	const quiet = time.Second // for a client that has found the file, and isn't in the queue yet
	for _, w := range *a.shared.Load() {
		if w.s.file == (fileKey{}) || w.s.hasFile(a.at) || time.Since(began)-time.Duration(w.used.Load()) < quiet || w.s.readable() || w.isRenamed() {
			continue
		}
		if p := w.s.pooled; p != nil && a.h.isOwned(p) {
			continue // another process accepts from it, and holds this one's
		}
		if a.unshare(w) {
			a.withdraw(w.s.pooled)
			w.s.discard()
		}
	}
}

// isRenamed tells whether the file of a unix socket is in its directory by another name.
func (w *watch) isRenamed() bool {
	dir := filepath.Dir(w.a.at.host)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) // it isn't known
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		if e.Type() != os.ModeSocket {
			return false
		}
		return fileKeyAt(filepath.Join(dir, e.Name())) == w.s.file
	})
}

// isInherited tells whether a closed member, or another process, has left the socket, and
// not long ago.
func (w *watch) isInherited() bool {
	return w.of.Load() == nil && time.Since(began)-time.Duration(w.since.Load()) < inheritedFor
}

// mark marks the socket as ready.
func (w *watch) mark() {
	w.a.ready.Add(1)
	w.ready.Store(true)
}

// run offers the socket whenever connections are queued in it, until stop. It may be
// marked as ready already.
func (w *watch) run(marked bool) {
	defer close(w.ended)
	for {
		if !marked {
			if !w.wait() {
				return
			}
			w.mark()
		}
		w.a.offer()
		select {
		case <-w.rearm:
		case <-w.quit:
			return
		}
		marked = false
	}
}

// wait returns true when a connection is queued in the socket, false after stop.
func (w *watch) wait() bool {
	for {
		if conn := w.waitable(); conn != nil && conn.Read(readable) == nil {
			return true
		}
		// Stopped, told to look, or no descriptor is left to wait on.
		if w.s.readable() {
			return true
		}
		select {
		case <-w.quit:
			return false
		case <-time.After(pollEvery):
		}
	}
}

// waitable returns a duplicate of the socket that can wait for connections,
// which a net.TCPListener can't without accepting one; nil without descriptors.
func (w *watch) waitable() syscall.RawConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.quit:
		return nil
	default:
	}
	if w.file == nil {
		w.file, _ = w.s.ln.File()
	}
	if w.file == nil {
		return nil
	}
	w.file.SetReadDeadline(time.Time{}) // that of lookAgain
	conn, _ := w.file.SyscallConn()
	return conn
}

// lookAgain ends a wait on the duplicate, after which wait looks by itself.
func (w *watch) lookAgain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != nil {
		w.file.SetReadDeadline(longAgo)
	}
}

// offer wakes an Accept, if one waits, so that it looks what is ready. If none
// does, the next one looks by itself.
func (a *address) offer() {
	members := *a.members.Load()
	turn := int(a.begins.Add(1) % maxMembers)
	for i := range members {
		if members[(turn+i)%len(members)].wake() {
			return
		}
	}
}

// offerReady is offer, if something is ready.
func (a *address) offerReady() {
	if a.ready.Load() != 0 {
		a.offer()
	}
}

// offerLater is offerReady after an error of a shared socket, which is one Accept's:
// whoever is woken at once would get the same one.
func (a *address) offerLater() { time.AfterFunc(retryAfter, a.offerReady) }

// takeShared accepts from a shared socket that is ready: nothing if there is none.
func (a *address) takeShared() (net.Conn, *watch, error) {
	shared := *a.shared.Load()
	turn := int(a.begins.Add(1) % maxMembers)
	for i := range shared {
		w := shared[(turn+i)%len(shared)]
		if c, err := w.take(); c != nil || err != nil {
			return c, w, err
		}
	}
	return nil, nil, nil
}

// take accepts a connection from the socket, if one is queued and nobody else is
// taking: nil and no error if not.
func (w *watch) take() (net.Conn, error) {
	if !w.ready.Load() || !w.taking.TryLock() {
		return nil, nil
	}
	if w.stopped || !w.ready.Load() {
		w.taking.Unlock()
		return nil, nil
	}
	w.s.ln.SetDeadline(time.Now().Add(takeTimeout))
	c, err := w.s.ln.Accept()
	w.used.Store(int64(time.Since(began)))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c, err = nil, nil
	case errors.Is(err, syscall.EINVAL):
		// It listens no more: somebody has shut it down, by a descriptor that
		// SyscallConn or File gave out. That is no sibling's error.
		w.taking.Unlock()
		if w.a.unshare(w) {
			go w.a.discard(w.s)
		}
		return nil, nil
	case err != nil:
		c = nil
	}
	more := w.s.readable()
	if !more && w.ready.CompareAndSwap(true, false) {
		w.a.ready.Add(-1)
		w.rearm <- struct{}{}
	}
	w.taking.Unlock()
	if more && c == nil && err == nil {
		w.a.offer() // otherwise the Accept does, when it leaves
	}
	return c, err
}

// stop ends the watch. When it returns nobody takes from the socket any more,
// now or later.
func (w *watch) stop() {
	w.mu.Lock()
	close(w.quit)
	file := w.file
	w.mu.Unlock()
	if file != nil {
		file.Close()
	}
	<-w.ended
	w.taking.Lock()
	defer w.taking.Unlock()
	w.stopped = true
	if w.ready.CompareAndSwap(true, false) {
		w.a.ready.Add(-1)
	}
}
