//go:build unix && !aix

package lblisten

// Handoff: processes that name one directory hold duplicates of each other's listening
// sockets. Here is what the addresses of a process ask of it: to enter and leave, to
// deposit a socket before it is bound, to claim one for a member, and what would become
// of the sockets. What an address shares is found out in handoff_share_unix.go, how the
// others are told is in handoff_link_unix.go, what each knows in handoff_pool_unix.go.
//
// The order of locks is handoff.applying, address.mu, handoff.mu, link.mu. Nothing
// waits, and nothing of the user's is called, under the last three.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const canHandoff = true

// handoffs has the handoffs of this process by path.
var handoffs = struct {
	mu sync.Mutex // guards m, and refs of each; nothing is waited for under it
	m  map[string]*handoff
}{m: make(map[string]*handoff)}

// A handoff is this process as one of a directory.
type handoff struct {
	path    string
	id      id
	log     *slog.Logger // of who asked for it first
	refs    int          // addresses and keepers; guarded by handoffs.mu
	opened  chan struct{}
	err     error // why it couldn't be; for whoever has seen opened closed
	quit    context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup // of all its goroutines but those that write the log
	poked   chan struct{}  // has run look; holds one
	doubted chan []id      // has run ask; holds one

	changed time.Time // when the directory was changed last; run's
	looks   int       // to be taken at it; run's

	applying sync.Mutex // held over all of apply

	mu        sync.Mutex // guards what follows, and all of the pool
	pool      pool
	awaiting  int
	turn      chan struct{} // closed and made anew when something has changed, if somebody awaits it
	ln        *net.UnixListener
	file      fileKey      // of ln
	reserve   *descriptor  // held for peers; see takeReserveLocked
	space     uint64       // the network namespace of this process, 0 if it isn't known
	conns     int          // links, and those that are about to be
	links     map[id]*link // by the other process
	dialing   map[id]*link
	strangers map[id]error // in the directory, and not to be dialled: why
	foreign   error        // one that doesn't let this process in
	settled   bool         // join is over
	suspects  bool         // something is queued in another's socket
	retry     bool         // somebody couldn't be dialled for now
	why       error        // this process isn't to be found; nil if it is
	questions map[uint32]*question
	lastN     uint32
	addresses map[place]*address
	keepers   int           // calls of Keep
	keepFor   time.Duration // how long those keep an address without processes; 0 for ever
	notes     []note        // for the log
	logging   bool          // somebody writes them
}

// openHandoff returns the handoff of a path, and a use of it. What the process is to be in it,
// begin does before it meets the others, so that they hear it at once. The first use of a
// process waits until the others have told what they have, exchangeTime at the most.
func openHandoff(path string, log *slog.Logger, a *address, begin func(*handoff)) (*handoff, error) {
	if err := checkHandoffPath(path); err != nil {
		return nil, err
	}
	handoffs.mu.Lock()
	h := handoffs.m[path]
	isNew := h == nil
	if isNew {
		h = newHandoff(path, log)
		handoffs.m[path] = h
	}
	h.refs++
	handoffs.mu.Unlock()
	begin(h)
	if isNew {
		if h.err = h.join(); h.err == nil {
			h.wg.Add(1)
			go h.run()
		}
		close(h.opened)
	}
	<-h.opened
	if h.err != nil {
		h.close()
		return nil, h.err
	}
	h.apply() // what came last may not be shared yet
	h.mu.Lock()
	defer h.mu.Unlock()
	if a != nil && h.why != nil {
		a.note(a.log, trouble, "the handoff goes on in the background", "path", path, "reason", h.why)
	}
	return h, nil
}

func newHandoff(path string, log *slog.Logger) *handoff {
	h := &handoff{path: path, id: newID(), log: log, opened: make(chan struct{}), poked: make(chan struct{}, 1), doubted: make(chan []id, 1), turn: make(chan struct{}),
		links: make(map[id]*link), dialing: make(map[id]*link), strangers: make(map[id]error), questions: make(map[uint32]*question), addresses: make(map[place]*address)}
	h.quit, h.stop = context.WithCancel(context.Background())
	h.pool = newPool(h.id, h.hasRoom)
	return h
}

// close gives a use back. With the last one everything is closed.
func (h *handoff) close() {
	handoffs.mu.Lock()
	h.refs--
	last := h.refs == 0
	if last && handoffs.m[h.path] == h {
		delete(handoffs.m, h.path)
	}
	handoffs.mu.Unlock()
	if !last {
		return
	}
	h.stop()
	h.mu.Lock()
	if h.ln != nil {
		if h.file != (fileKey{}) && fileKeyAt(h.name()) == h.file {
			os.Remove(h.name())
		}
		h.ln.Close()
	}
	h.mu.Unlock()
	h.wg.Wait()
	h.reserve.release()
	for _, s := range h.pool.sockets {
		s.d.release()
	}
	h.pool.sockets = nil
}

// hasRoom tells whether descriptors are left for the sockets of others.
func (h *handoff) hasRoom() bool {
	if h.reserve == nil {
		return false
	}
	d, err := duplicate(uintptr(h.reserve.fd))
	if err != nil {
		return false
	}
	defer d.release()
	coming := 0
	for _, peer := range h.pool.peers {
		coming += len(peer.wants)
	}
	return !isScarce(d.fd + coming)
}

// enter puts an address into the handoff: from here on it shares what nobody else
// serves, and its processes know of each other. It is called with the turn, as are
// leave, deposit and find.
func (h *handoff) enter(a *address) {
	h.mu.Lock()
	h.addresses[a.at] = a
	h.pool.on[a.at] = true
	h.tellLocked(frame{kind: frameOn, at: a.at})
	h.mu.Unlock()
	h.apply()
}

// leave takes an address that ends out of the handoff: its sockets are anybody's. It
// returns when others have taken over or let go, and tells whether others have.
func (h *handoff) leave(a *address) (others bool) {
	h.mu.Lock()
	if h.addresses[a.at] != a {
		h.mu.Unlock()
		return false
	}
	delete(h.addresses, a.at)
	delete(h.pool.on, a.at)
	for _, s := range h.pool.sockets {
		if s.at == a.at {
			s.left = s.left || s.mine
			s.mine, s.shared = false, false
		}
	}
	h.mu.Unlock()
	begin := time.Now()
	q, _ := h.ask(context.Background(), frame{kind: frameOff, at: a.at}, nil)
	if q.yes == 0 { // is whoever hasn't answered dead? Those in the directory without a link are dialled
		h.look()
	}
	h.await(context.Background(), patience, func() bool { return len(h.dialing) == 0 })
	if left := exchangeTime - time.Since(begin); left > time.Millisecond { // one that has just come still asks for what it lacks
		h.await(context.Background(), left, func() bool { return h.pool.isHandedOver(a.at) })
	}
	h.mu.Lock()
	others = q.yes > 0 || h.pool.keeper
	for _, s := range h.pool.sockets {
		if s.at == a.at && !others && h.pool.isOrphan(s) {
			h.pool.forget(s)
		}
	}
	if !others && (h.pool.unheard > 0 || h.pool.others(a.at)) {
		others = true // who knows: somebody doesn't answer
		a.note(a.log, trouble, "nobody has confirmed that it takes over the sockets of this process", "path", h.path, "address", a.at)
	} else if others {
		a.note(a.log, news, "other processes inherit the sockets of this one", "path", h.path, "address", a.at)
	}
	h.mu.Unlock()
	h.apply()
	return others
}

// mayBeHeld tells whether another process may go on listening at a socket that this one
// lets go. Of one that it has opened it knows who holds it.
func (h *handoff) mayBeHeld(s *socket) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for x := range s.pooled.who {
		if h.pool.peers[x] != nil {
			return true
		}
	}
	return h.pool.keeper || s.received
}

// deposit puts a new socket into the pool, before it is bound, and returns when the
// others have it, or can't be waited for. The error is one of this process.
func (h *handoff) deposit(ctx context.Context, c syscall.RawConn, a *address, at place) (*pooled, error) {
	s := &pooled{id: newID(), at: a.at, sub: at.network, balanced: a.d == nil, mine: true}
	err := control(c, func(fd uintptr) (err error) { s.d, err = duplicate(fd); return err })
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.pool.add(s)
	f := s.frame(frameHas)
	h.mu.Unlock()
	if _, err = h.ask(ctx, f, s.d); err != nil {
		h.withdraw(s)
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for x := range h.pool.peers {
		if s.who[x] == 0 {
			a.note(a.log, trouble, "a process doesn't take a socket of this one", "path", h.path, "address", a.at, "process", x)
		}
	}
	a.note(a.log, routine, "a socket is deposited", "path", h.path, "address", a.at, "with", len(s.who))
	return s, nil
}

// depositKept puts a socket into the pool that this process has from systemd. It returns
// nil if it is there already, because others have had it meanwhile.
func (h *handoff) depositKept(ctx context.Context, s *socket, a *address) (*pooled, error) {
	h.mu.Lock()
	for _, p := range h.pool.sockets {
		if keyOf(p.d.fd) == keyOf(int(s.fd)) {
			h.mu.Unlock()
			return nil, nil
		}
	}
	h.mu.Unlock()
	p, err := h.deposit(ctx, s.conn, a, place{network: s.net})
	if err == nil {
		h.bound(p, a.at, s.file)
	}
	return p, err
}

// bound tells that a socket listens, on which address and with which file.
func (h *handoff) bound(s *pooled, at place, file fileKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.at, s.file, s.bound = at, file, true
	h.tellLocked(s.frame(frameBound))
}

// withdraw takes a socket that nobody needs any more out of the pool.
func (h *handoff) withdraw(s *pooled) {
	h.mu.Lock()
	s.mine, s.shared = false, false
	h.pool.forget(s)
	h.tellLocked(s.frame(frameDrop))
	h.mu.Unlock()
	h.apply()
}

// isOwned tells whether another process that is there accepts from a socket.
func (h *handoff) isOwned(s *pooled) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pool.isOwned(s)
}

// letShare notes that the address of a socket shares it from here on, as any process
// does: it was the dispatcher's.
func (h *handoff) letShare(s *pooled) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.mine, s.shared = false, true
	h.tellLocked(s.frame(frameRelease))
}

// claim asks for a socket that this process shares, for a member that is to accept
// from it. It returns false if another process has it, or may have.
func (h *handoff) claim(ctx context.Context, s *pooled) bool {
	h.mu.Lock()
	mine, may := s.mine, h.pool.sockets[s.id] == s && h.pool.isOrphan(s) && !s.claimed
	s.claimed = s.claimed || may
	h.mu.Unlock()
	if mine || !may {
		return mine
	}
	q, err := h.ask(ctx, frame{kind: frameClaim, id: s.id}, nil)
	h.mu.Lock()
	defer h.mu.Unlock()
	s.claimed = false
	if err != nil || q.no > 0 || h.pool.sockets[s.id] != s || !h.pool.isOrphan(s) {
		return false
	}
	h.ownLocked(s)
	return true
}

// ownLocked notes and tells that this process accepts from a socket.
func (h *handoff) ownLocked(s *pooled) {
	s.mine, s.shared, s.left = true, false, false
	h.tellLocked(s.frame(frameHas))
}

// giveBack undoes a claim.
func (h *handoff) giveBack(s *pooled) {
	h.mu.Lock()
	s.mine, s.left = false, true
	h.tellLocked(s.frame(frameRelease))
	h.mu.Unlock()
	h.apply()
}

// find returns the dispatcher's socket of an address, if there is one in the pool that
// clients reach. It is called with the turn.
func (h *handoff) find(a *address) (*socket, error) {
	file := lookAtFile(a.at)
	h.applying.Lock() // nobody shares it meanwhile
	defer h.applying.Unlock()
	h.mu.Lock()
	var s *pooled
	for _, x := range h.pool.sockets {
		if x.at == a.at && !x.balanced && x.bound && !x.mine && x.checked && (!a.at.isFile() || file != (fileKey{}) && (x.file == file || x.file == (fileKey{}))) {
			s = x
		}
	}
	if s == nil {
		h.mu.Unlock()
		return nil, nil
	}
	shared := s.shared
	h.ownLocked(s)
	h.mu.Unlock()
	if shared {
		a.takeBack(s)
	}
	sock, err := h.open(s, a)
	if err != nil {
		h.mu.Lock()
		s.mine = false // the next look shares it again
		h.mu.Unlock()
	}
	return sock, err
}

// state tells whether another process would take over what this one leaves on an
// address: nil, or why not.
func (h *handoff) state(at place) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	why := errors.New("no other process listens on the address, and no keeper runs: start a second one, or lbkeep " + h.path)
	for _, err := range h.strangers {
		why = err
	}
	if len(h.dialing) > 0 {
		why = errors.New("a process doesn't answer; is it stopped?")
	}
	for x, peer := range h.pool.peers {
		switch {
		case !peer.on[at] && !peer.keeper:
		case peer.silent:
			why = fmt.Errorf("process %v doesn't answer; is it stopped?", x)
		case !h.pool.holdsAll(x, at):
			why = errors.New("the others don't have every socket of this process: they are short of descriptors")
		default:
			return nil
		}
	}
	if h.why != nil {
		why = h.why
	}
	return fmt.Errorf("the handoff %s: %w", h.path, why)
}

// sayLocked has a line written to the log, by a goroutine of its own: whoever calls it
// can't wait for a Handler, which is the user's.
func (h *handoff) sayLocked(l *slog.Logger, level slog.Level, msg string, args ...any) {
	if l == nil {
		return
	}
	h.notes = append(h.notes, func() { log(l, level, msg, args...) })
	if !h.logging {
		h.logging = true
		go h.writeNotes()
	}
}

func (h *handoff) writeNotes() {
	for {
		h.mu.Lock()
		notes := h.notes
		h.notes = nil
		h.logging = notes != nil
		h.mu.Unlock()
		if notes == nil {
			return
		}
		writeNotes(notes)
	}
}
