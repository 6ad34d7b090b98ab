//go:build unix && !aix

package lblisten

// Handoff: processes that name the same path hold duplicates of each other's
// listening sockets. Here is what the groups of a process ask of the handoff: to
// enter it and leave it, to deposit a socket in its pool before it is bound, to
// claim one for a member, and what would become of the sockets. How the other
// processes are told isn't known here (that is the link, handoff_link_unix.go, to
// the hub of them all, handoff_hub_unix.go), nor which sockets of the others are
// shared with a group (the pool, handoff_pool_unix.go, and share in inherit.go).
//
// One rule covers every end of another process: a socket of the pool is left
// alone only while a hub that lives says that a process that lives accepts from
// it. Without a hub, because it died or is stopped, everybody serves
// everything. Accepting twice from one socket is harmless, so nothing depends
// on who is right about who owns it.
//
// No lock is held over an exchange. The order of locks is handoff.applying,
// group.mu, handoff.mu, wire.mu; hub.mu also comes before wire.mu, and is never
// taken together with the others.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const canHandoff = true

// handoffs has the handoffs of this process by path.
var handoffs = struct {
	mu sync.Mutex // guards m, and refs of each; nothing else is locked or waited for under it
	m  map[string]*handoff
}{m: make(map[string]*handoff)}

// A handoff is this process in the set of a path.
type handoff struct {
	path    string
	process processID
	log     *slog.Logger // of who asked for it first
	refs    int          // groups; guarded by handoffs.mu
	quit    context.Context
	stop    context.CancelFunc  // of quit
	ended   chan struct{}       // closed when everything is closed
	changed chan struct{}       // something in the pool changed; holds one
	own     atomic.Pointer[hub] // in this process, now or before

	// applying orders changes of what groups share. It is held while sockets are
	// opened, shared and taken back, so it comes before group.mu and mu.
	applying sync.Mutex

	// mu guards what follows, and of each pooled what changes. It comes after
	// group.mu. Nothing waits and nothing is logged under it, and only wire.mu is
	// taken. Functions that end in Locked are called with it, if they name no other.
	mu        sync.Mutex
	w         *wire // to the hub; nil without one
	hub       processID
	synced    bool // the hub has told everything
	alone     bool // the hub was lost, and no other has told everything yet
	lost      time.Time
	why       error         // why it is not synced
	turn      chan struct{} // closed when synced, w or why changes
	sockets   map[socketID]*pooled
	dropped   []*pooled // that were shared, and have to be taken back
	addresses map[place]*address
	peers     map[place]int // processes that listen there, this one included
	answers   map[uint32]func(ok, answered bool)
	lastN     uint32
}

// openHandoff returns the handoff of a path, and a use of it.
func openHandoff(path string, log *slog.Logger) (*handoff, error) {
	path, err := checkHandoffPath(path)
	if err != nil {
		return nil, fmt.Errorf("WithHandoff: %w", err)
	}
	handoffs.mu.Lock()
	defer handoffs.mu.Unlock()
	h := handoffs.m[path]
	if h == nil {
		h = newHandoff(path, log)
		handoffs.m[path] = h
	}
	h.refs++
	return h, nil
}

func newHandoff(path string, log *slog.Logger) *handoff {
	h := &handoff{path: path, process: newID(), log: log, lost: time.Now(), why: errors.New("the hub has not answered yet"),
		ended: make(chan struct{}), changed: make(chan struct{}, 1), turn: make(chan struct{}),
		sockets: make(map[socketID]*pooled), addresses: make(map[place]*address), peers: make(map[place]int),
		answers: make(map[uint32]func(ok, answered bool))}
	h.quit, h.stop = context.WithCancel(context.Background())
	go h.run()
	return h
}

// close gives a use back. With the last one everything is closed.
func (h *handoff) close() {
	handoffs.mu.Lock()
	h.refs--
	last := h.refs == 0
	if last {
		delete(handoffs.m, h.path)
	}
	handoffs.mu.Unlock()
	if last {
		h.end()
	}
}

func (h *handoff) end() {
	h.stop()
	<-h.ended
}

// enter puts a group into the pool: from here on it shares what nobody accepts
// from, and its processes know of each other. It waits until the hub has told
// everything, but not for long. It is called with the turn, as are leave, deposit and
// find.
func (h *handoff) enter(ctx context.Context, a *address) {
	h.mu.Lock()
	h.addresses[a.at] = a
	h.mu.Unlock()
	if _, err := h.exchange(ctx, frame{kind: frameOn, at: a.at}); err != nil {
		a.note(a.log, trouble, "the handoff goes on in the background", "path", h.path, "reason", err)
	}
	a.notes = append(a.notes, h.apply()...)
}

// leave takes a group that ends out of the pool: its sockets are anybody's. It
// returns true if another process listens on its address.
func (h *handoff) leave(a *address) (others bool) {
	h.mu.Lock()
	if h.addresses[a.at] != a {
		h.mu.Unlock()
		return false
	}
	delete(h.addresses, a.at)
	for _, p := range h.sockets {
		if p.at == a.at {
			p.disownLocked()
			p.unshareLocked()
		}
	}
	h.mu.Unlock()
	others, err := h.exchange(context.Background(), frame{kind: frameOff, at: a.at})
	if err != nil {
		// A hub that is slow to answer believes what it was told when it was greeted.
		h.mu.Lock()
		if h.w != nil {
			h.w.send(frame{kind: frameOff, at: a.at}, nil)
		}
		h.mu.Unlock()
		a.note(a.log, trouble, "nobody could be told that this process leaves its sockets", "path", h.path, "address", a.at, "reason", err)
		return true // who knows
	}
	if others {
		a.note(a.log, news, "other processes inherit the sockets of this one", "path", h.path, "address", a.at)
	}
	return others
}

// deposit puts a new socket into the pool, before it is bound, and returns when
// the others have it, or can't be waited for. The error is one of this process.
func (h *handoff) deposit(ctx context.Context, c syscall.RawConn, a *address, at place) (*pooled, error) {
	p := &pooled{id: newID(), at: a.at, sub: at.network, balanced: a.d == nil, kept: make(chan struct{})}
	if p.balanced {
		p.ownLocked() // nobody else knows of it yet
	}
	kept := p.kept
	err := control(c, func(fd uintptr) (err error) { p.d, err = duplicate(fd); return err })
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.sockets[p.id] = p
	if h.w != nil {
		h.giveLocked(p)
	}
	h.mu.Unlock()
	err = h.await(ctx, kept)
	h.mu.Lock()
	if err == nil && !p.isKept {
		err = fmt.Errorf("the hub refuses it: it takes %d of a process, while it has descriptors to spare", handoffMost)
	}
	h.mu.Unlock()
	if err != nil {
		a.note(a.log, trouble, "a socket is not deposited yet", "path", h.path, "address", a.at, "reason", err)
	} else {
		a.note(a.log, routine, "a socket is deposited", "path", h.path, "address", a.at)
	}
	return p, nil
}

// bound tells the address of a socket whose port the system chose.
func (h *handoff) bound(p *pooled, at place) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.at != at {
		p.at = at
		if h.w != nil {
			h.w.send(frame{kind: frameBound, id: p.id, at: at}, nil)
		}
	}
}

// withdraw takes a socket that never listened out of the pool.
func (h *handoff) withdraw(p *pooled) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sockets[p.id] != p {
		return
	}
	h.forgetLocked(p)
	if h.w != nil {
		h.w.send(frame{kind: frameDrop, id: p.id}, nil)
	}
}

// claim asks for a socket that this process shares, for a member that is to
// accept from it. It returns false if another process has it, or nobody can be
// asked: without a hub everybody shares everything, and what is owned isn't known.
func (h *handoff) claim(ctx context.Context, p *pooled) bool {
	h.mu.Lock()
	mine := p.role == roleOwned
	h.mu.Unlock()
	if mine {
		return true
	}
	ok, err := h.exchange(ctx, frame{kind: frameOwner, flags: flagMine, id: p.id})
	if err != nil {
		h.giveBack(p) // the answer may only be late
	}
	if err != nil || !ok {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sockets[p.id] != p {
		return false
	}
	p.ownLocked()
	return true
}

// giveBack undoes a claim.
func (h *handoff) giveBack(p *pooled) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.disownLocked()
	if h.w != nil {
		h.w.send(frame{kind: frameOwner, id: p.id}, nil)
	}
	h.change()
}

// state tells whether another process would take over what this one leaves on an
// address: nil, or why not.
func (h *handoff) state(at place) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.synced {
		return fmt.Errorf("the handoff %s: %w", h.path, h.why)
	}
	if h.peers[at] < 2 {
		return fmt.Errorf("the handoff %s: no other process listens on the address", h.path)
	}
	for _, p := range h.sockets {
		if p.at == at && (p.role == roleOwned || !p.balanced) && !p.isKept {
			return fmt.Errorf("the handoff %s: the others don't have every socket of this process (they take %d)", h.path, handoffSockets)
		}
	}
	return nil
}

// find returns the dispatcher's socket of an address if there is one in the
// pool.
func (h *handoff) find(a *address) (*socket, error) {
	h.mu.Lock()
	var found *pooled
	for _, p := range h.sockets {
		if p.at == a.at && !p.balanced && p.role != roleRefused && listens(p.d) {
			found = p
			p.d.hold()
			break
		}
	}
	h.mu.Unlock()
	if found == nil {
		return nil, nil
	}
	defer found.d.release()
	err := checkSocket(found, a)
	if err == nil && a.at.isFile() {
		_, err = os.Lstat(a.at.host)
	}
	if err != nil {
		h.mu.Lock()
		found.refuseLocked()
		h.mu.Unlock()
		a.note(a.log, trouble, "a socket of the handoff can't be used", "path", h.path, "address", a.at, "reason", err)
		return nil, nil
	}
	ln, err := listenerOf(found.d)
	if err != nil {
		return nil, err
	}
	s, err := newSocket(ln, a.at.network, nil)
	if err != nil {
		ln.Close()
		return nil, err
	}
	s.received, s.file = true, lookAtFile(a.at)
	return s, nil
}
