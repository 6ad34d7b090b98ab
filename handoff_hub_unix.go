//go:build unix && !aix

package lblisten

// The hub of a handoff: the one of its processes that has the lock. It passes
// new sockets on to all and knows which process accepts from which. It is
// nobody special: everybody holds every socket, so when it dies another process
// takes the lock and the rest tell it what they have. Its own process is a
// client of it like the others, over the same kind of connection.
//
// Here is how the hub begins and ends, and how processes come and go. What it
// does when one of them says something is in handoff_hubpool_unix.go.

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

	// mu guards what follows, and of each hubPeer and hubSocket what changes.
	// Nothing blocks under it: what is to be sent is queued, for which only wire.mu
	// is taken. Functions that end in Locked are called with it.
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
	process processID         // set before it is asked or owns anything
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
	by       *hubPeer  // who sent it, while that lives; until it listens it is worth nothing without
}

// A deposit is a socket that was passed on, and not confirmed by all yet.
type deposit struct {
	from  *hubPeer
	n     uint32 // what from wants an answer to
	wait  map[*hubPeer]bool
	timer *time.Timer
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
		h.syncAllLocked()
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
	for _, s := range h.sockets { // nobody changes them any more
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
	h.leaveLocked(p)
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
