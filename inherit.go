package lblisten

// What becomes of a socket and its queue when a member closes while siblings
// live: it is shared from then on. A watch waits until a connection is there,
// and tells a member that waits in Accept to come and take it. It never
// accepts by itself: what waits, waits in the kernel. The same watch serves the
// second socket of a dual-stack member where the kernel needs two.
//
// How nothing is overlooked. Every side first says what it has, then looks at
// what the others said:
//
//   - An Accept counts itself in, then looks at the watched sockets, then blocks
//     on its own socket. A watch marks its socket ready, then looks for a member
//     with an Accept counted in, and kicks it (Listener.kick). One of the two
//     sees the other.
//   - A kick is a mark in the word that counts the Accepts. Whichever Accept of
//     the member counts itself out while the mark is set, takes the mark away.
//     From then on it owes a look: it takes from a ready socket, and when it
//     returns, for whatever reason, it has the sockets that are still ready look
//     for a member again (group.offerReady): so a member that closes, times out
//     or returns with a connection of its own in the instant in which it is
//     kicked passes the kick on.
//   - Who takes from a socket holds its token, and before giving that back looks
//     whether more is waiting: if so he kicks the next member, else he sends the
//     watch back to waiting.

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	// retryAfter is when a socket whose Accept failed for now (EMFILE) is offered
	// to a waiting member again, if no Accept has come back to it by itself.
	retryAfter = 250 * time.Millisecond

	// takeTimeout ends an accept on a socket on which a connection was waiting a
	// moment ago: it can be gone only where it was reset by its client, on
	// kernels that then take it out of the queue.
	takeTimeout = time.Millisecond

	// pollEvery is how often a watch looks at its socket when there is no
	// descriptor to be had for waiting.
	pollEvery = 10 * time.Millisecond
)

// began is what a watch counts from: a clock that is set changes nothing.
var began = time.Now()

// A watch is a socket that no Accept blocks on.
type watch struct {
	s     *socket
	g     *group
	owner *Listener // who alone takes from it; nil: any member, the socket is shared

	wanted bool // a new member is about to adopt it; guarded by g.mu

	used  atomic.Int64  // when it was shared, or taken from last: ns since began
	ready atomic.Bool   // a connection waits; counted in g.ready
	token sync.Mutex    // held by who takes, only ever tried by members; for ever once stopped
	rearm chan struct{} // the socket was found empty
	quit  chan struct{} // closed by stop
	ended chan struct{} // closed when run has returned

	mu   sync.Mutex
	file *os.File // a duplicate of the socket, to wait on; guarded by mu
}

// watch makes a watch, whose run the caller starts.
func (g *group) watch(s *socket, owner *Listener) *watch {
	return &watch{s: s, g: g, owner: owner,
		rearm: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{})}
}

// share makes sockets shared ones: what waits in them is to be had when it
// returns. It is called under g.mu.
func (g *group) share(socks []*socket) {
	shared := append([]*watch(nil), *g.shared.Load()...)
	marked := make([]bool, len(socks))
	for i, s := range socks {
		w := g.watch(s, nil)
		w.used.Store(int64(time.Since(began)))
		marked[i] = w.readable() && w.mark()
		shared = append(shared, w)
	}
	g.shared.Store(&shared)
	for i, w := range shared[len(shared)-len(socks):] {
		go w.run(marked[i]) // only now: whom it kicks must find it
	}
}

// inherit makes a socket of another process a shared one. It returns false if
// the group has begun to end.
func (g *group) inherit(s *socket) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.dying {
		g.share([]*socket{s})
	}
	return !g.dying
}

// adopt takes a shared socket out of the group for a new member; nil if there
// is none. Of a handoff's sockets it takes those that no other process takes.
func (g *group) adopt(ctx context.Context, network string) *socket {
	var refused []*watch
	for {
		g.mu.Lock()
		for _, w := range refused {
			w.wanted = false
		}
		shared := *g.shared.Load()
		i := slices.IndexFunc(shared, func(w *watch) bool {
			return !w.wanted && w.s.net == network && !slices.Contains(refused, w)
		})
		if i < 0 {
			g.mu.Unlock()
			return nil
		}
		w := shared[i]
		w.wanted = true
		g.mu.Unlock()
		p := w.s.pooled
		if p != nil && !g.h.claim(ctx, p) {
			refused = append(refused, w) // another process has it
			continue
		}
		if g.unshare(w) {
			w.s.ln.SetDeadline(time.Time{}) // that of the last take
			return w.s
		}
		if p != nil {
			g.h.giveBack(p)
		}
	}
}

// takeBack ends the sharing of a socket that another process accepts from.
func (g *group) takeBack(p *pooled) {
	shared := *g.shared.Load()
	if i := slices.IndexFunc(shared, func(w *watch) bool { return w.s.pooled == p }); i >= 0 && g.unshare(shared[i]) {
		shared[i].s.ln.Close()
	}
}

// unshare takes a shared socket out of the group. It returns false if somebody
// else did.
func (g *group) unshare(w *watch) bool {
	g.mu.Lock()
	before := *g.shared.Load()
	rest := slices.DeleteFunc(slices.Clone(before), func(x *watch) bool { return x == w })
	g.shared.Store(&rest)
	g.mu.Unlock()
	if len(rest) == len(before) {
		return false
	}
	w.stop()
	return true
}

// mark marks the socket as ready.
func (w *watch) mark() bool {
	w.g.ready.Add(1)
	w.ready.Store(true)
	return true
}

// run offers the socket whenever connections wait in it, until stop. It may be
// marked as ready already.
func (w *watch) run(marked bool) {
	defer close(w.ended)
	for marked || w.wait() && w.mark() {
		if !w.offerUntilEmpty() {
			return
		}
		marked = false
	}
}

// offerUntilEmpty returns true when the socket has been found empty, false
// after stop.
func (w *watch) offerUntilEmpty() bool {
	w.offer()
	retry := time.NewTicker(w.g.retryAfter)
	defer retry.Stop()
	for {
		select {
		case <-w.rearm:
			return true
		case <-retry.C:
			w.offer()
		case <-w.quit:
			return false
		}
	}
}

// wait returns true when a connection waits in the socket, false after stop.
func (w *watch) wait() bool {
	for {
		if conn := w.waitable(); conn != nil && conn.Read(readable) == nil {
			return true
		}
		// Stopped, or no descriptor is left to wait on.
		if w.readable() {
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

// readable tells whether a connection waits in the socket now.
func (w *watch) readable() bool {
	r := false
	w.s.conn.Control(func(fd uintptr) { r = readable(fd) })
	return r
}

// offer kicks a member that waits in Accept, if there is one, so that it takes
// from the socket. If there is none, the next Accept looks by itself.
func (w *watch) offer() {
	if w.owner != nil {
		w.owner.kick()
		return
	}
	members := *w.g.members.Load()
	turn := int(w.g.turn.Add(1) % maxMembers)
	for i := range members {
		if members[(turn+i)%len(members)].kick() {
			return
		}
	}
}

// lookAgain has every Accept look that waits although a connection is there: the
// kernel has put it into the queue and told nobody (see lookAgainEvery).
func (g *group) lookAgain() {
	for _, l := range *g.members.Load() {
		if l.state.Load()&countMask != 0 && l.ownReadable() {
			l.kick()
		}
	}
	for _, w := range *g.shared.Load() {
		if !w.ready.Load() && w.readable() {
			w.lookAgain()
		}
	}
	g.k.tick()
}

// lookAgain ends a wait on the duplicate, after which wait looks by itself.
func (w *watch) lookAgain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != nil {
		w.file.SetReadDeadline(longAgo)
	}
}

// offerReady offers what waits in the watched sockets that a member may take
// from.
func (g *group) offerReady(l *Listener) {
	if g.ready.Load() == 0 {
		return
	}
	if l.side != nil && l.side.ready.Load() {
		l.side.offer()
	}
	for _, w := range *g.shared.Load() {
		if w.ready.Load() {
			w.offer()
		}
	}
}

// take accepts a connection from the socket, if one waits and nobody else is
// taking: nil and no error if not.
func (w *watch) take() (*net.TCPConn, error) {
	if !w.ready.Load() || !w.token.TryLock() {
		return nil, nil
	}
	if !w.ready.Load() {
		w.token.Unlock()
		return nil, nil
	}
	w.s.ln.SetDeadline(time.Now().Add(takeTimeout))
	c, err := w.s.ln.AcceptTCP()
	w.used.Store(int64(time.Since(began)))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = nil
	case errors.Is(err, syscall.EINVAL) && w.owner == nil:
		// It listens no more: somebody has shut it down, by a descriptor that
		// SyscallConn or File gave him. That is no sibling's error.
		w.token.Unlock()
		if w.g.unshare(w) {
			w.g.k.discard(w.s)
		}
		return nil, nil
	}
	more := w.readable()
	if !more && w.ready.CompareAndSwap(true, false) {
		w.g.ready.Add(-1)
		w.rearm <- struct{}{}
	}
	restore := w.s.restore // who adopts the socket sets it, once the token is never given back
	w.token.Unlock()
	if more && err == nil {
		w.offer()
	}
	if c != nil && restore != nil {
		restore(c)
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
	w.token.Lock()
	if w.ready.CompareAndSwap(true, false) {
		w.g.ready.Add(-1)
	}
}
