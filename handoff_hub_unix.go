//go:build unix && !aix

package lblisten

// The hub of a handoff: the one of its processes that has the lock. It passes
// new sockets on to all and knows which process accepts from which. It is
// nobody special: everybody holds every socket, so when it dies another process
// takes the lock and the rest tell it what they have. Its own process is a
// client of it like the others, over the same kind of connection.
//
// Nothing blocks under hub.mu: what is to be sent is queued.

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// handoffVersions are the versions of the protocol that this process speaks.
	handoffLowest, handoffHighest = 1, 1

	handoffSockets = 256  // the most of one process
	handoffPeers   = 4096 // the most processes of a set
)

var (
	// gatherTime is how long a new hub waits at most for the processes that the
	// one before knew, before it tells anybody who is gone.
	gatherTime = 300 * time.Millisecond

	// slowAfter is how long a process may take to confirm a socket before nobody
	// waits for it any more.
	slowAfter = exchangeTime / 2

	// handoffMost is handoffSockets.
	handoffMost = handoffSockets

	// unservedFor is how long the sockets of an address are kept for its next
	// process when the last one died.
	unservedFor = 30 * time.Second
)

var errLocked = errors.New("another process is the hub")

type hub struct {
	path    string
	process processID // its own client
	lock    *os.File
	ln      *net.UnixListener
	inode   fs.FileInfo // of the socket file
	quit    chan struct{}
	over    chan struct{} // closed when it is the hub no more
	count   chan int      // of the processes, for the lock file; holds one
	wg      sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	peers    map[*hubPeer]bool
	sockets  map[socketID]*hubSocket
	pending  map[uint32]*deposit // by the number of what was passed on
	lastN    uint32
	young    bool                  // it waits for processes that the hub before knew
	expected int                   // how many of them there must be
	missing  map[processID]bool    // those that others say accept from a socket, and didn't come yet
	wanted   map[socketID]*hubPeer // who was asked for a socket, and has not sent it yet
}

// A hubPeer is a process of the set.
type hubPeer struct {
	w       *wire
	process processID
	asked   bool              // it has said all that it holds
	has     map[socketID]bool // and whether it accepts from it; until it was told the rest
	synced  bool              // it was told the rest, and is from then on
	on      map[place]bool    // where it listens
	owns    int               // sockets
	slow    bool              // it didn't confirm in time, and nobody waits for it
}

type hubSocket struct {
	d        *descriptor
	f        frame     // as it came
	owner    *hubPeer  // nil: nobody
	unserved time.Time // since when nobody listens on its address; zero if somebody does
	by       *hubPeer  // who sent it, if he lives; until it listens it is worth nothing without him
}

// A deposit is a socket that was passed on, and not confirmed by all yet.
type deposit struct {
	from  *hubPeer
	n     uint32 // what he wants an answer to
	wait  map[*hubPeer]bool
	timer *time.Timer
}

// lockPath and newPath are the files beside the path of a handoff.
func lockPath(path string) string { return path + ".lock" }
func newPath(path string) string  { return path + ".new" }

// openLock opens the lock file and checks that it is this user's.
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(lockPath(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file", f.Name())
	case uidOf(st) != os.Geteuid():
		err = fmt.Errorf("%s belongs to uid %d, this process is uid %d", f.Name(), uidOf(st), os.Geteuid())
	case st.Size() > 0:
		if _, ours := readCount(f); !ours {
			err = fmt.Errorf("%s is there already and is not the lock file of a handoff: choose another path", f.Name())
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// lockText is what is in a lock file: how many processes the hub knew last.
// It is overwritten in place, so that it is whole at any time.
const lockText = "lblisten handoff, processes: %4d\n"

// readCount returns the number in a lock file, and whether it is one.
func readCount(f *os.File) (n int, ours bool) {
	b := make([]byte, 64)
	size, _ := f.ReadAt(b, 0)
	_, err := fmt.Sscanf(string(b[:size]), lockText, &n)
	return n, err == nil
}

// startHub takes the lock and listens on the path, or returns errLocked.
// Everything that binds or removes a file is done under the lock.
func startHub(path string, process processID) (*hub, error) {
	lock, err := openLock(path)
	if err != nil {
		return nil, err
	}
	h := &hub{path: path, lock: lock, quit: make(chan struct{}), over: make(chan struct{}), count: make(chan int, 1),
		peers: make(map[*hubPeer]bool), sockets: make(map[socketID]*hubSocket),
		pending: make(map[uint32]*deposit), wanted: make(map[socketID]*hubPeer), missing: make(map[processID]bool), process: process}
	if err := h.begin(); err != nil {
		lock.Close()
		return nil, err
	}
	h.wg.Add(2)
	go h.accept()
	go h.watch()
	return h, nil
}

func (h *hub) begin() error {
	var lerr error
	conn, err := h.lock.SyscallConn()
	if err != nil {
		return err
	}
	if err := conn.Control(func(fd uintptr) { lerr = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return err
	}
	if lerr == unix.EWOULDBLOCK {
		return errLocked
	}
	if lerr != nil {
		return os.NewSyscallError("flock", lerr)
	}
	if !h.hasLock() {
		return errLocked // the file was removed meanwhile, who comes later makes another
	}
	for _, path := range []string{h.path, newPath(h.path)} {
		if err := checkSocketFile(path); err != nil {
			return err
		}
		if c, err := net.DialTimeout("unix", path, exchangeTime); err == nil {
			c.Close()
			return fmt.Errorf("another program listens on %s", path) // or a hub whose lock file was removed, for a moment
		}
	}
	if err := os.Remove(newPath(h.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	h.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: newPath(h.path), Net: "unix"})
	if err != nil {
		return err
	}
	h.ln.SetUnlinkOnClose(false)
	if err = os.Chmod(newPath(h.path), 0o600); err == nil {
		err = os.Rename(newPath(h.path), h.path)
	}
	if err == nil {
		h.inode, err = os.Lstat(h.path)
	}
	if err != nil {
		h.ln.Close()
		os.Remove(newPath(h.path))
		return err
	}
	// The hub before left the number of its processes if it died.
	if before, _ := readCount(h.lock); before > 1 {
		h.expected = before - 1
	}
	h.young = true
	time.AfterFunc(gatherTime, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.young = false
		h.syncAll()
	})
	return nil
}

// hasLock tells whether the file that is locked is the one at the path still.
func (h *hub) hasLock() bool {
	mine, err := h.lock.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(lockPath(h.path))
	return err == nil && os.SameFile(mine, there)
}

// accept accepts connections until the hub is over.
func (h *hub) accept() {
	defer h.wg.Done()
	for {
		c, err := h.ln.AcceptUnix()
		if err != nil {
			select {
			case <-h.quit:
				return
			case <-time.After(50 * time.Millisecond): // no descriptors, say: that passes
			}
			continue
		}
		h.mu.Lock()
		if h.closed || len(h.peers) >= handoffPeers {
			h.mu.Unlock()
			c.Close()
			continue
		}
		p := &hubPeer{w: newWire(c), has: make(map[socketID]bool), on: make(map[place]bool)}
		h.peers[p] = true
		h.wg.Add(1)
		h.mu.Unlock()
		go h.serve(p)
	}
}

// watch writes the number of processes into the lock file, and once a second
// looks after what nobody tells of.
func (h *hub) watch() {
	defer h.wg.Done()
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-h.quit:
			return
		case n := <-h.count:
			h.writeCount(n)
		case <-tick.C:
			// Somebody may have cleaned up. Without its files nobody finds this hub,
			// and another process may be the hub by now.
			there, err := os.Lstat(h.path)
			if !h.hasLock() || err != nil || !os.SameFile(there, h.inode) {
				go h.close()
				return
			}
			h.dropUnserved()
		}
	}
}

func (h *hub) writeCount(n int) {
	h.lock.WriteAt(fmt.Appendf(nil, lockText, n), 0) // if it fails, the next hub goes by what the others say
}

// close ends the hub: it removes its file, then lets the peers go, then the
// lock. It is safe to call twice, and waits until it is over.
func (h *hub) close() {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		<-h.over
		return
	}
	h.closed = true
	others := 0
	for p := range h.peers {
		if p.synced && p.process != h.process {
			others++
		}
	}
	h.mu.Unlock()
	close(h.quit)
	if h.hasLock() {
		if there, err := os.Lstat(h.path); err == nil && os.SameFile(there, h.inode) {
			os.Remove(h.path)
		}
	}
	h.ln.Close()
	h.mu.Lock()
	for p := range h.peers {
		p.w.c.Close()
	}
	h.mu.Unlock()
	h.wg.Wait()
	for _, s := range h.sockets {
		s.d.release()
	}
	h.writeCount(others + 1) // as if it had died
	h.lock.Close()
	close(h.over)
}

// serve reads what a peer says until it goes.
func (h *hub) serve(p *hubPeer) {
	defer h.wg.Done()
	err := h.greet(p)
	for err == nil {
		var f frame
		var d *descriptor
		if f, d, err = p.w.read(silentAfter); err == nil {
			err = h.hear(p, f, d)
			if d != nil {
				d.release()
			}
		}
	}
	h.mu.Lock()
	h.leave(p)
	h.mu.Unlock()
	p.w.close()
	p.w.drain()
}

// greet checks who the peer is and agrees on a version, before anything else.
func (h *hub) greet(p *hubPeer) error {
	if err := checkPeer(p.w.c); err != nil {
		return err
	}
	f, d, err := p.w.read(exchangeTime)
	if d != nil {
		d.release()
	}
	if err != nil {
		return err
	}
	if f.kind != frameHello || f.at.network != helloName {
		return errFrame
	}
	version := min(handoffHighest, int(f.n&0xffff))
	if version < max(handoffLowest, int(f.n>>16)) {
		version = 0 // none
	}
	p.process = f.process
	p.w.send(frame{kind: frameHello, n: uint32(version), process: h.process}, nil)
	if version == 0 {
		return errors.New("no common version")
	}
	return nil
}

// hear does what a frame asks for.
func (h *hub) hear(p *hubPeer, f frame, d *descriptor) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	s := h.sockets[f.id]
	switch f.kind {
	case frameHas:
		if !p.synced {
			p.has[f.id] = f.flags&flagMine != 0
		}
		if h.young && f.process != (processID{}) && h.peer(f.process) == nil {
			h.missing[f.process] = true
		}
		switch {
		case s != nil && f.flags&flagMine != 0 && (s.owner == nil || s.owner.process == p.process):
			h.own(p, s)
		case s == nil && h.wanted[f.id] == nil:
			h.want(p, f.id)
		}
	case frameSynced:
		p.asked = true
		h.expected = max(h.expected, int(f.n)-1) // of them the hub before is gone
		delete(h.missing, p.process)
		h.syncAll()
	case frameSocket:
		delete(h.wanted, f.id)
		defer h.syncAll()
		if s == nil {
			// Descriptors are for this process's own connections first.
			if p.owns >= handoffMost || len(h.sockets) >= handoffSockets*handoffPeers || isScarce(d.fd) || checkReceived(d, f.at) != nil {
				reply(p, f.n, 0)
				break
			}
			h.deposit(p, f, d)
			break
		}
		reply(p, f.n, flagOK)
	case frameOwner:
		if f.flags&flagMine == 0 {
			if s != nil && s.owner == p {
				h.own(nil, s)
			}
			break
		}
		if s == nil || s.owner != nil && s.owner != p || p.owns >= handoffMost {
			reply(p, f.n, 0)
			break
		}
		h.own(p, s)
		reply(p, f.n, flagOK)
	case frameDrop:
		if s != nil && (s.by == p || s.owner == p) {
			h.drop(s)
		}
	case frameBound:
		if s != nil && (s.by == p || s.owner == p) && s.f.at.port == 0 {
			s.f.at = f.at
			h.tell(p, frame{kind: frameBound, id: f.id, at: f.at})
		}
	case frameOn:
		p.on[f.at] = true
		h.recount(f.at)
		reply(p, f.n, flagOK)
	case frameOff:
		reply(p, f.n, h.off(p, f.at))
	case frameReply:
		if dep := h.pending[f.n]; dep != nil {
			h.confirmed(f.n, dep, p)
		}
		p.slow = false
	}
	return nil
}

func reply(p *hubPeer, n uint32, flags byte) {
	if n != 0 {
		p.w.send(frame{kind: frameReply, n: n, flags: flags}, nil)
	}
}

// tell sends a frame to every peer but one. Those that aren't synced are told
// everything when they are. It is called under mu, as all that follow.
func (h *hub) tell(but *hubPeer, f frame) {
	for p := range h.peers {
		if p != but && p.synced {
			p.w.send(f, nil)
		}
	}
}

func (h *hub) own(p *hubPeer, s *hubSocket) {
	if s.owner != nil {
		s.owner.owns--
	}
	f := frame{kind: frameOwner, id: s.f.id}
	s.owner = p
	if p != nil {
		p.owns++
		f.process = p.process
	}
	h.tell(nil, f)
}

func (h *hub) drop(s *hubSocket) {
	if s.owner != nil {
		s.owner.owns--
	}
	delete(h.sockets, s.f.id)
	s.d.release()
	h.tell(nil, frame{kind: frameDrop, id: s.f.id})
}

// socketFrame is how a peer is told of a socket.
func socketFrame(s *hubSocket, n uint32) frame {
	f := s.f
	f.kind, f.n, f.flags = frameSocket, n, f.flags&flagBalanced
	f.process = processID{}
	if s.owner != nil {
		f.process = s.owner.process
	}
	return f
}

// deposit keeps a new socket, passes it on, and answers when all have it.
func (h *hub) deposit(p *hubPeer, f frame, d *descriptor) {
	s := &hubSocket{d: d.hold(), f: f, by: p}
	h.sockets[f.id] = s
	for q := range h.peers {
		if q == p && f.flags&flagMine != 0 || q.has[f.id] {
			s.owner = q
			q.owns++
			break
		}
	}
	h.lastN++
	n := max(h.lastN, 1)
	dep := &deposit{from: p, n: f.n, wait: make(map[*hubPeer]bool)}
	for q := range h.peers {
		if q != p && q.synced {
			q.w.send(socketFrame(s, n), d)
			if !q.slow {
				dep.wait[q] = true
			}
		}
	}
	if len(dep.wait) == 0 {
		reply(p, f.n, flagOK)
		return
	}
	h.pending[n] = dep
	dep.timer = time.AfterFunc(slowAfter, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for q := range dep.wait {
			q.slow = true
			h.confirmed(n, dep, q)
		}
	})
}

// confirmed takes a peer off those that a deposit waits for.
func (h *hub) confirmed(n uint32, dep *deposit, p *hubPeer) {
	delete(dep.wait, p)
	if len(dep.wait) == 0 && h.pending[n] == dep {
		dep.timer.Stop()
		delete(h.pending, n)
		reply(dep.from, dep.n, flagOK)
	}
}

// want asks a peer for a socket that it has.
func (h *hub) want(p *hubPeer, id socketID) {
	if len(h.wanted) == 0 {
		time.AfterFunc(gatherTime, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			clear(h.wanted)
			h.syncAll()
		})
	}
	h.wanted[id] = p
	p.w.send(frame{kind: frameWant, id: id}, nil)
}

// complete tells whether everything is known that there is to know.
func (h *hub) complete() bool {
	if h.young {
		came := 0
		for p := range h.peers {
			if p.hasCome() {
				came++
			}
		}
		if came < h.expected || len(h.missing) > 0 {
			return false
		}
	}
	return len(h.wanted) == 0
}

// hasCome tells whether a peer can be one that the hub before knew, and has said all
// that it holds.
func (p *hubPeer) hasCome() bool { return p.asked && (p.synced || len(p.has) > 0) }

// peer returns the peer of a process that has said all that it holds.
func (h *hub) peer(process processID) *hubPeer {
	for p := range h.peers {
		if p.asked && p.process == process {
			return p
		}
	}
	return nil
}

// syncAll tells those that asked what they don't know, once everything is known.
func (h *hub) syncAll() {
	if h.closed || !h.complete() {
		return
	}
	for p := range h.peers {
		if p.asked && !p.synced {
			h.sync(p)
		}
	}
}

func (h *hub) sync(p *hubPeer) {
	for id, s := range h.sockets {
		if _, has := p.has[id]; !has {
			p.w.send(socketFrame(s, 0), s.d)
			continue
		}
		f := frame{kind: frameOwner, id: id}
		if s.owner != nil {
			f.process = s.owner.process
		}
		p.w.send(f, nil)
	}
	for id := range p.has {
		if h.sockets[id] == nil { // who was asked for it first hasn't sent it
			p.w.send(frame{kind: frameWant, id: id}, nil)
		}
	}
	p.has, p.synced = nil, true
	p.w.send(frame{kind: frameSynced}, nil)
	h.counted()
	for at := range p.on {
		h.recount(at)
	}
}

// counted has the number of processes written into the lock file.
func (h *hub) counted() {
	n := 0
	for p := range h.peers {
		if p.synced {
			n++
		}
	}
	select {
	case <-h.count:
	default:
	}
	h.count <- n // room for one was just made, under mu
}

// recount tells the peers on an address how many they are.
func (h *hub) recount(at place) {
	n := 0
	for p := range h.peers {
		if p.on[at] && p.synced {
			n++
		}
	}
	for p := range h.peers {
		if p.on[at] {
			p.w.send(frame{kind: framePeers, at: at, n: uint32(n)}, nil)
		}
	}
}

// on counts the peers on an address that live, also if nobody has read yet that one
// has gone: who is told that others accept leaves them a unix socket's file.
func (h *hub) on(at place) int {
	n := 0
	for p := range h.peers {
		if p.on[at] && !p.w.isCut() {
			n++
		}
	}
	return n
}

// off: a peer leaves an address. Its sockets there are anybody's, and if nobody
// is there any more, that is their end. It returns flagOK if somebody is.
func (h *hub) off(p *hubPeer, at place) byte {
	delete(p.on, at)
	others := h.on(at) > 0 || !h.complete() // who knows who comes
	for _, s := range h.sockets {
		switch {
		case s.f.at != at:
		case !others:
			h.drop(s)
		case s.owner == p:
			h.own(nil, s)
		}
	}
	h.recount(at)
	if others {
		return flagOK
	}
	return 0
}

// leave: a peer is gone.
func (h *hub) leave(p *hubPeer) {
	delete(h.peers, p)
	if p.hasCome() {
		h.expected--
	}
	for _, s := range h.sockets {
		if s.by == p {
			s.by = nil
			if !listens(s.d) {
				h.drop(s) // and never will
				continue
			}
		}
		if s.owner == p {
			h.own(nil, s)
		}
	}
	for n, dep := range h.pending {
		if dep.wait[p] {
			h.confirmed(n, dep, p)
		}
	}
	for id, q := range h.wanted {
		if q == p {
			delete(h.wanted, id)
			for r := range h.peers {
				if _, has := r.has[id]; has {
					h.want(r, id)
					break
				}
			}
		}
	}
	h.syncAll()
	for at := range p.on {
		h.recount(at)
	}
	if p.synced && !h.closed {
		h.counted()
	}
}

// dropUnserved ends what waits in vain.
func (h *hub) dropUnserved() {
	h.mu.Lock()
	defer h.mu.Unlock()
	on := make(map[place]bool)
	for p := range h.peers {
		for at := range p.on {
			on[at] = true
		}
	}
	for _, s := range h.sockets {
		switch {
		case s.owner != nil || on[s.f.at]:
			s.unserved = time.Time{}
		case s.unserved.IsZero():
			s.unserved = time.Now()
		case time.Since(s.unserved) >= unservedFor:
			h.drop(s)
		}
	}
}
