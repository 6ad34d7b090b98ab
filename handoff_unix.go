//go:build unix && !aix

package lblisten

// Handoff: processes that name the same path hold duplicates of each other's
// listening sockets. Here is what a process does: it keeps a pool of all sockets
// of the set, deposits its own in it before they are bound, shares those that
// nobody accepts from with its groups (see share in inherit.go), and lets
// members adopt them. The hub, which connects the processes, is in
// handoff_hub_unix.go, what they say in handoff_wire_unix.go.
//
// One rule covers every end of another process: a socket of the pool is left
// alone only while a hub that lives says that a process that lives accepts from
// it. Without a hub, because it died or is stopped, everybody serves
// everything. Accepting twice from one socket is harmless, so nothing depends
// on who is right about who owns it.
//
// No lock is held over an exchange. handoff.mu is the last in the order of
// locks; applying, which comes before group.mu, orders changes of what is shared.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const canHandoff = true

// handoffs has the handoffs of this process by path.
var handoffs = struct {
	mu sync.Mutex
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

	applying sync.Mutex // held while sockets are shared or taken back

	mu      sync.Mutex
	w       *wire // to the hub; nil without one
	hub     processID
	synced  bool // the hub has told everything
	alone   bool // the hub was lost, and no other has told everything yet
	lost    time.Time
	why     error         // why it is not synced
	turn    chan struct{} // closed when synced, w or why changes
	sockets map[socketID]*pooled
	dropped []*pooled // that were shared, and have to be taken back
	groups  map[place]*group
	peers   map[place]int // processes that listen there, this one included
	answers map[uint32]func(ok, answered bool)
	lastN   uint32
}

// A pooled is a socket of the set, as this process knows it. Guarded by
// handoff.mu, but for what never changes.
type pooled struct {
	id       socketID
	d        *descriptor
	sub      string // the network of the socket, where a member has two
	balanced bool   // it is one of the kernel's group
	at       place  // the address of its group; port 0 until it is known
	mine     bool   // this process accepts from it, or what a member of it left is shared here
	owner    processID
	shared   bool          // this process shares it, because nobody is known to accept from it
	fresh    bool          // it came while the hub had not told everything yet
	refused  bool          // it is not what it is said to be
	kept     chan struct{} // closed when the others have it, for who waits for that
	isKept   bool          // they have it, as far as is known
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
		sockets: make(map[socketID]*pooled), groups: make(map[place]*group), peers: make(map[place]int),
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

// checkHandoffPath returns the absolute path of a handoff, or why it can't be
// one and what to do. It harms nothing.
func checkHandoffPath(path string) (string, error) {
	// The name is bound with a suffix first; see hub.begin.
	most := len(syscall.RawSockaddrUnix{}.Path) - 1 - len(newPath(""))
	if path == "" || strings.ContainsRune(path, 0) {
		return "", errors.New("the path is empty, or has a NUL in it")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(abs) > most {
		return "", fmt.Errorf("%s has %d bytes, and a unix socket here can have a path of %d: choose a shorter one", abs, len(abs), most)
	}
	dir := filepath.Dir(abs)
	st, err := os.Stat(dir)
	if err != nil {
		return "", fmt.Errorf("the directory of the path: %w", err)
	}
	uid := os.Geteuid()
	switch owner := uidOf(st); {
	case !st.IsDir():
		return "", fmt.Errorf("%s is not a directory", dir)
	case owner != uid && owner != 0:
		return "", fmt.Errorf("the directory %s belongs to uid %d: choose one of uid %d, which this process has, or root's", dir, owner, uid)
	case st.Mode()&0o022 != 0:
		return "", fmt.Errorf("the directory %s can be written to by others (mode %#o): choose one that only uid %d or root can write to, such as /run/NAME with mode 0755", dir, st.Mode().Perm(), uid)
	case !canCheckPeer && (owner != uid || st.Mode()&0o077 != 0):
		return "", fmt.Errorf("this system doesn't tell whose a process is, so the directory %s must have mode 0700 and belong to uid %d", dir, uid)
	}
	if err := checkSocketFile(abs); err != nil {
		return "", err
	}
	lock, err := openLock(abs)
	switch {
	case err == nil:
		lock.Close()
	case !isShortage(err):
		return "", fmt.Errorf("its lock file: %w", err)
	}
	return abs, nil
}

// checkSocketFile checks that what is at a path, if anything, is a socket of
// this user.
func checkSocketFile(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there already and is not a unix socket: choose another path", path)
	case uidOf(st) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, this process is uid %d: processes of one user can hand off to each other", path, uidOf(st), os.Geteuid())
	}
	return nil
}

// uidOf returns the owner of a file.
func uidOf(st fs.FileInfo) int {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// checkPeer checks that the process at the other end is this user's.
func checkPeer(c *net.UnixConn) error {
	if !canCheckPeer {
		return nil // the directory is this user's alone
	}
	conn, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var uid int
	if err := control(conn, func(fd uintptr) (err error) { uid, err = peerUID(int(fd)); return err }); err != nil {
		return err
	}
	if uid != os.Geteuid() {
		return fmt.Errorf("the process at the other end is of uid %d, this one of uid %d", uid, os.Geteuid())
	}
	return nil
}

// run keeps the process connected with a hub, which it is itself if nobody else
// is, until end.
func (h *handoff) run() {
	defer close(h.ended)
	settled := make(chan struct{})
	go func() {
		defer close(settled)
		for {
			select {
			case <-h.quit.Done():
				return
			case <-h.changed:
				h.settle()
			}
		}
	}()
	const firstPause, lastPause = 2 * time.Millisecond, 100 * time.Millisecond
	pause := firstPause
	for h.quit.Err() == nil {
		var err error
		if !h.isHub() {
			var own *hub
			if own, err = startHub(h.path, h.process); err == nil {
				h.own.Store(own)
				log(h.log, "this process is the hub of the handoff", "path", h.path)
			} else if err != errLocked {
				h.fail(err)
			}
		}
		if err == nil || err == errLocked {
			synced, err := h.session()
			switch {
			case synced:
				pause = firstPause
				continue
			case isShortage(err):
				pause = beatEvery
			}
		}
		select {
		case <-time.After(pause):
		case <-h.quit.Done():
		}
		pause = min(2*pause, lastPause)
	}
	<-settled
	if own := h.own.Load(); own != nil {
		own.close()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.sockets {
		p.d.release()
	}
	h.sockets = nil
}

// isHub tells whether the hub is in this process.
func (h *handoff) isHub() bool {
	own := h.own.Load()
	if own == nil {
		return false
	}
	select {
	case <-own.over: // somebody removed its files
		return false
	default:
		return true
	}
}

// fail notes why there is no hub.
func (h *handoff) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.synced {
		h.lost = time.Now()
	}
	h.w, h.synced, h.alone, h.why = nil, false, true, err
	for _, p := range h.sockets {
		if p.fresh && isShortage(err) {
			h.forget(p) // others hold it, and descriptors are for this process's own first
			continue
		}
		p.fresh, p.isKept = false, false // this process may be the only one that holds it
		if p.owner == h.hub {
			p.owner = processID{} // it is the one that is gone
		}
	}
	answers := h.answers
	h.answers = make(map[uint32]func(ok, answered bool))
	for _, answer := range answers {
		answer(false, false)
	}
	h.turned()
}

// turned tells who waits for a turn, and has what is shared settled anew. It is
// called under mu.
func (h *handoff) turned() {
	close(h.turn)
	h.turn = make(chan struct{})
	h.change()
}

func (h *handoff) change() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// session connects with the hub and hears what it says until it goes. It
// returns whether it got as far as being told everything, and why it ended.
func (h *handoff) session() (synced bool, err error) {
	dialer := net.Dialer{Timeout: exchangeTime}
	c, err := dialer.DialContext(h.quit, "unix", h.path)
	if err != nil {
		h.fail(err)
		return false, err
	}
	w := newWire(c.(*net.UnixConn))
	defer w.drain()
	defer w.close()
	defer context.AfterFunc(h.quit, func() { c.Close() })()
	if err := h.greet(w); err != nil {
		h.fail(err)
		return false, err
	}
	for {
		f, d, err := w.read(silentAfter)
		if err == nil {
			if err = h.hear(w, f, d); err != nil && !isShortage(err) {
				log(h.log, "a descriptor of the handoff was refused", "path", h.path, "reason", err)
				err = nil
			}
		}
		if err == nil {
			continue
		}
		h.mu.Lock()
		synced := h.synced
		h.mu.Unlock()
		if synced && h.quit.Err() == nil {
			log(h.log, "the hub of the handoff is gone; until another answers, this process serves all sockets", "path", h.path, "reason", err)
		}
		h.fail(err)
		return synced, err
	}
}

// greet agrees with the hub on a version and says what this process holds.
func (h *handoff) greet(w *wire) error {
	if err := checkPeer(w.c); err != nil {
		return err
	}
	w.send(frame{kind: frameHello, n: handoffLowest<<16 | handoffHighest, process: h.process, at: place{network: helloName}}, nil)
	f, d, err := w.read(exchangeTime)
	if d != nil {
		d.release()
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the hub doesn't answer; is its process stopped?")
	case err != nil:
		return err
	case f.kind == frameBeat: // it may come first, by the hub's clock
		return errors.New("the hub is slow")
	case f.kind != frameHello:
		return errFrame
	case f.n < handoffLowest || f.n > handoffHighest:
		return fmt.Errorf("the hub speaks other versions of the protocol, this process %d to %d", handoffLowest, handoffHighest)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.sockets {
		w.send(frame{kind: frameHas, flags: p.flags(), id: p.id, process: p.owner, at: p.at, sub: p.sub}, nil)
		p.owner = processID{} // unless the hub says so again
		p.isKept = true       // unless the hub wants it
	}
	for at := range h.groups { // first of all: nobody may think that he is the last one there
		w.send(frame{kind: frameOn, at: at}, nil)
	}
	known := 0
	for _, n := range h.peers {
		known = max(known, n)
	}
	w.send(frame{kind: frameSynced, n: uint32(known)}, nil)
	h.w, h.hub = w, f.process
	return nil
}

func (p *pooled) flags() (flags byte) {
	if p.mine {
		flags |= flagMine
	}
	if p.balanced {
		flags |= flagBalanced
	}
	return flags
}

// hear does what a frame from the hub says. It returns why a descriptor was
// refused.
func (h *handoff) hear(w *wire, f frame, d *descriptor) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d != nil {
		defer d.release()
	}
	if h.quit.Err() != nil {
		return nil // it takes nothing any more
	}
	p := h.sockets[f.id]
	switch f.kind {
	case frameSocket:
		if p == nil {
			if err := checkReceived(d, f.at); err != nil {
				return err
			}
			if isScarce(d.fd) {
				return fmt.Errorf("no descriptors are left for the sockets of other processes: %w", unix.EMFILE)
			}
			p = &pooled{id: f.id, d: d.hold(), sub: f.sub, at: f.at, balanced: f.flags&flagBalanced != 0, isKept: true, fresh: !h.synced}
			h.sockets[f.id] = p
		}
		p.owner = f.process
		if f.n != 0 {
			w.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
		}
		h.change()
	case frameWant:
		if p != nil {
			p.isKept = false
			h.give(p)
		}
	case frameOwner:
		if p != nil {
			p.owner = f.process
			h.change()
		}
	case frameBound:
		if p != nil && p.at.port == 0 {
			p.at = f.at
			h.change()
		}
	case frameDrop:
		switch {
		case p == nil:
		case p.mine: // it can't know
			p.isKept = false
			h.give(p)
		default:
			h.forget(p)
		}
	case framePeers:
		h.peers[f.at] = int(f.n)
	case frameSynced:
		h.synced, h.alone, h.why = true, false, nil
		clear(h.peers) // the hub counts anew, after this
		for _, p := range h.sockets {
			p.fresh = false
			if p.isKept {
				p.keep()
			}
		}
		h.turned()
	case frameReply:
		if answer := h.answers[f.n]; answer != nil {
			delete(h.answers, f.n)
			answer(f.flags&flagOK != 0, true)
		}
	}
	return nil
}

// forget takes a socket out of the pool. It is called under mu.
func (h *handoff) forget(p *pooled) {
	delete(h.sockets, p.id)
	p.d.release()
	if p.shared {
		p.shared = false
		h.dropped = append(h.dropped, p)
		h.change()
	}
}

// ask sends a frame that wants an answer. It is called under mu, and so is
// answer; answered is false if there is no hub (any more).
func (h *handoff) ask(f frame, d *descriptor, answer func(ok, answered bool)) {
	if h.w == nil {
		answer(false, false)
		return
	}
	h.lastN = max(1, h.lastN+1)
	f.n = h.lastN
	h.answers[f.n] = answer
	h.w.send(f, d)
}

// give deposits a socket with the hub. It is called under mu.
func (h *handoff) give(p *pooled) {
	h.ask(frame{kind: frameSocket, flags: p.flags(), id: p.id, at: p.at, sub: p.sub}, p.d, func(ok, answered bool) {
		if answered {
			p.keep()
			p.isKept = ok
		}
	})
}

// keep notes that the others have a socket. It is called under mu.
func (p *pooled) keep() {
	p.isKept = true
	if p.kept != nil {
		close(p.kept)
		p.kept = nil
	}
}

// await waits until done is closed: for exchangeTime at most, and not at all if
// the hub was lost longer ago than that.
func (h *handoff) await(ctx context.Context, done <-chan struct{}) error {
	limit := time.NewTimer(exchangeTime)
	defer limit.Stop()
	for {
		h.mu.Lock()
		turn, synced, since, why := h.turn, h.synced, time.Since(h.lost), h.why
		h.mu.Unlock()
		var lost <-chan time.Time
		if !synced {
			if since >= exchangeTime {
				select {
				case <-done:
					return nil
				default:
				}
				return why
			}
			timer := time.NewTimer(exchangeTime - since)
			defer timer.Stop()
			lost = timer.C
		}
		select {
		case <-done:
			return nil
		case <-turn:
		case <-lost:
		case <-limit.C:
			// Whoever waits next, waits for another hub.
			h.mu.Lock()
			h.lost = time.Now().Add(-exchangeTime)
			if h.synced && h.w != nil {
				h.synced, h.why = false, errors.New("the hub doesn't answer; is its process stopped?")
				h.w.c.Close()
				h.turned()
			}
			h.mu.Unlock()
			return fmt.Errorf("no answer within %v", exchangeTime)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// exchange sends a frame, and returns the answer: an error if there was none. If
// the hub goes before it answers, the next one is asked.
func (h *handoff) exchange(ctx context.Context, f frame) (ok bool, err error) {
	for begin := time.Now(); ; {
		if err := h.awaitSynced(ctx); err != nil {
			return false, err
		}
		done := make(chan struct{})
		var yes, answered bool
		h.mu.Lock()
		h.ask(f, nil, func(ok, really bool) {
			yes, answered = ok, really
			close(done)
		})
		h.mu.Unlock()
		if err := h.await(ctx, done); err != nil {
			return false, err
		}
		switch {
		case answered:
			return yes, nil
		case time.Since(begin) > exchangeTime/2:
			return false, errors.New("the hub is gone")
		}
	}
}

// enter puts a group into the pool: from here on it shares what nobody accepts
// from, and its processes know of each other. It waits until the hub has told
// everything, but not for long.
func (h *handoff) enter(ctx context.Context, g *group) {
	h.mu.Lock()
	h.groups[g.at] = g
	h.mu.Unlock()
	if _, err := h.exchange(ctx, frame{kind: frameOn, at: g.at}); err != nil {
		log(g.log, "the handoff goes on in the background", "path", h.path, "reason", err)
	}
	h.settle()
}

func (h *handoff) awaitSynced(ctx context.Context) error {
	for {
		h.mu.Lock()
		synced, turn := h.synced, h.turn
		h.mu.Unlock()
		if synced {
			return nil
		}
		if err := h.await(ctx, turn); err != nil {
			return err
		}
	}
}

// leave takes a group that ends out of the pool: its sockets are anybody's. It
// returns true if another process listens on its address.
func (h *handoff) leave(g *group) (others bool) {
	h.mu.Lock()
	if h.groups[g.at] != g {
		h.mu.Unlock()
		return false
	}
	delete(h.groups, g.at)
	for _, p := range h.sockets {
		if p.at == g.at {
			p.mine, p.shared = false, false
		}
	}
	h.mu.Unlock()
	others, err := h.exchange(context.Background(), frame{kind: frameOff, at: g.at})
	if err != nil {
		// A hub that is slow to answer believes what it was told when it was greeted.
		h.mu.Lock()
		if h.w != nil {
			h.w.send(frame{kind: frameOff, at: g.at}, nil)
		}
		h.mu.Unlock()
		log(g.log, "nobody could be told that this process leaves its sockets", "path", h.path, "address", g.at, "reason", err)
		return true // who knows
	}
	if others {
		log(g.log, "other processes inherit the sockets of this one", "path", h.path, "address", g.at)
	}
	return others
}

// deposit puts a new socket into the pool, before it is bound, and returns when
// the others have it, or can't be waited for. The error is one of this process.
func (h *handoff) deposit(ctx context.Context, c syscall.RawConn, g *group, at place) (*pooled, error) {
	p := &pooled{id: newID(), at: g.at, sub: at.network, balanced: g.d == nil, mine: g.d == nil, kept: make(chan struct{})}
	kept := p.kept
	err := control(c, func(fd uintptr) (err error) { p.d, err = duplicate(fd); return err })
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.sockets[p.id] = p
	if h.w != nil {
		h.give(p)
	}
	h.mu.Unlock()
	err = h.await(ctx, kept)
	h.mu.Lock()
	if err == nil && !p.isKept {
		err = fmt.Errorf("the hub refuses it: it takes %d of a process, while it has descriptors to spare", handoffMost)
	}
	h.mu.Unlock()
	if err != nil {
		log(g.log, "a socket is not deposited yet", "path", h.path, "address", g.at, "reason", err)
	} else {
		log(g.log, "a socket is deposited", "path", h.path, "address", g.at)
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
	h.forget(p)
	if h.w != nil {
		h.w.send(frame{kind: frameDrop, id: p.id}, nil)
	}
}

// claim asks for a socket that this process shares, for a member that is to
// accept from it. It returns false if another process has it, or nobody can be
// asked: without a hub everybody shares everything, and what is owned isn't known.
func (h *handoff) claim(ctx context.Context, p *pooled) bool {
	h.mu.Lock()
	mine := p.mine
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
	p.mine, p.shared = true, false
	return true
}

// giveBack undoes a claim.
func (h *handoff) giveBack(p *pooled) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.mine = false
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
		if p.at == at && (p.mine || !p.balanced) && !p.isKept {
			return fmt.Errorf("the handoff %s: the others don't have every socket of this process (they take %d)", h.path, handoffSockets)
		}
	}
	return nil
}

// settle shares with its group what nobody is known to accept from, and takes
// back what somebody does.
func (h *handoff) settle() {
	var logs []func()
	defer func() { // without the lock
		for _, f := range logs {
			f()
		}
	}()
	h.applying.Lock()
	defer h.applying.Unlock()
	type step struct {
		p *pooled
		g *group
	}
	var share, back []step
	h.mu.Lock()
	for _, p := range h.dropped {
		back = append(back, step{p, h.groups[p.at]})
	}
	h.dropped = nil
	for _, p := range h.sockets {
		g := h.groups[p.at]
		if g == nil || p.mine || p.refused || !p.balanced || g.d != nil {
			continue
		}
		if p.fresh && h.w != nil {
			continue // the hub holds it, and this process may not be able to
		}
		// A claim of this process becomes its own only with the answer.
		switch free := h.alone || p.owner == (processID{}) || p.owner == h.process; {
		case free && !p.shared && listens(p.d):
			p.shared = true
			p.d.hold()
			share = append(share, step{p, g})
		case !free && p.shared:
			p.shared = false
			back = append(back, step{p, g})
		}
	}
	h.mu.Unlock()

	for _, s := range back {
		if s.g != nil {
			s.g.takeBack(s.p)
		}
	}
	for _, s := range share {
		sock, err := h.open(s.p, s.g)
		s.p.d.release()
		if err == nil {
			if s.g.inherit(sock) {
				logs = append(logs, func() {
					log(s.g.log, "this process serves a socket that nobody else is known to accept from", "path", h.path, "address", s.g.at)
				})
			} else {
				sock.ln.Close() // the group ends, and leaves the pool
			}
			continue
		}
		h.mu.Lock()
		s.p.shared = false
		s.p.refused = !isShortage(err)
		h.mu.Unlock()
		logs = append(logs, func() {
			log(s.g.log, "a socket of the handoff can't be used", "path", h.path, "address", s.g.at, "reason", err)
		})
		if isShortage(err) {
			time.AfterFunc(retryAfter, h.change)
		}
	}
}

// open makes a listening socket of a group out of one of the pool, after
// checking that it is what it is said to be.
func (h *handoff) open(p *pooled, g *group) (*socket, error) {
	if err := checkSocket(p, g); err != nil {
		return nil, err
	}
	ln, err := listenerOf(p.d)
	if err != nil {
		return nil, err
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		ln.Close()
		return nil, fmt.Errorf("a %T, want TCP", ln)
	}
	s := &socket{ln: tcp, net: p.sub, pooled: p, received: true, restore: restoreKeepAlive(g.lc)}
	s.conn, err = tcp.SyscallConn()
	return s, err
}

// find returns the dispatcher's socket of an address if there is one in the
// pool.
func (h *handoff) find(g *group) (net.Listener, error) {
	h.mu.Lock()
	var found *pooled
	for _, p := range h.sockets {
		if p.at == g.at && !p.balanced && !p.refused && listens(p.d) {
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
	err := checkSocket(found, g)
	if err == nil && isFile(g.at) {
		_, err = os.Lstat(g.at.host)
	}
	if err != nil {
		h.mu.Lock()
		found.refused = true
		h.mu.Unlock()
		log(g.log, "a socket of the handoff can't be used", "path", h.path, "address", g.at, "reason", err)
		return nil, nil
	}
	return listenerOf(found.d)
}

// checkSocket checks that a socket of the pool listens on the address of a
// group, in its way.
func checkSocket(p *pooled, g *group) error {
	sa, err := unix.Getsockname(p.d.fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	split := g.at.split()
	i := slices.IndexFunc(split, func(at place) bool { return at.network == p.sub })
	if i < 0 {
		return fmt.Errorf("a socket for network %q", p.sub)
	}
	at := split[i]
	wrong := fmt.Errorf("a socket that doesn't listen on %v", at)
	host, _, _ := strings.Cut(at.host, "%")
	ip, _ := netip.ParseAddr(host)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		if at.network != "tcp4" || netip.AddrFrom4(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
	case *unix.SockaddrInet6:
		if at.network == "tcp4" || netip.AddrFrom16(sa.Addr) != ip || sa.Port != at.port {
			return wrong
		}
		only, err := unix.GetsockoptInt(p.d.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil || ip.IsUnspecified() && (only == 0) != (at.network == "tcp") {
			return wrong
		}
	case *unix.SockaddrUnix:
		if sa.Name != at.host {
			return wrong
		}
	default:
		return wrong
	}
	if p.balanced && !isBalanced(uintptr(p.d.fd)) {
		return errors.New("a socket that the kernel doesn't balance")
	}
	if !listens(p.d) {
		return errors.New("a socket that doesn't listen")
	}
	return nil
}
