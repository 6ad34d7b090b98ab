//go:build unix && !aix

package lblisten

// The links of a handoff: how a process finds the others, and one link a pair. What is
// said on a link is heard by the pool (handoff_pool_unix.go); bytes are
// handoff_wire_unix.go's.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// exchangeTime is the most that an exchange with other processes takes.
	exchangeTime = time.Second

	// patience is how long after a newcomer has dialled everybody it asks those that
	// answer for what those that don't may own.
	patience = exchangeTime / 4

	// orphanLooks is how many units a socket of an address without processes is kept.
	orphanLooks = 30
)

const (
	queuedFrames = 1 << 14 // on a link whose peer doesn't read; more end it
	mostLinks    = 1 << 10

	lastWords = 50 * time.Millisecond // that a link that ends may take to write what is queued

	looksTogether = 4 // so many in lookEvery, of all processes of a handoff

	queuedLooks = 3 // at a socket in which something is queued, before its owner is asked
)

// A link is a connection with another process. One goroutine reads it; another
// writes while something is queued, so that send never blocks.
type link struct {
	h      *handoff
	c      *net.UnixConn
	peer   id
	dialed bool
	over   bool // the other process's link is to come instead; guarded by handoff.mu

	mu      sync.Mutex // guards what follows, for instants; a leaf
	queue   []parcel
	writing bool
	closed  bool
	full    bool // the peer didn't read for too long
	writer  sync.WaitGroup
}

// send queues a frame, and a use of the descriptor.
func (l *link) send(p parcel) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return
	case len(l.queue) >= queuedFrames:
		l.full = true
		l.c.Close()
		return
	case p.d != nil:
		p.d.hold()
	}
	l.queue = append(l.queue, p)
	if !l.writing {
		l.writing = true
		l.writer.Add(1)
		go l.write()
	}
}

// write writes what is queued.
func (l *link) write() {
	defer l.writer.Done()
	for {
		l.mu.Lock()
		queue := l.queue
		l.queue = nil
		l.writing = len(queue) > 0
		l.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		if writeParcels(l.c, queue) != nil {
			l.c.Close() // the reader sees it
		}
		for _, p := range queue {
			p.d.release()
		}
	}
}

// close ends the link. It is called by the reader.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.c.SetWriteDeadline(time.Now().Add(lastWords))
	l.writer.Wait()
	l.c.Close()
}

// hello is the first frame of a link.
func (h *handoff) helloLocked() frame {
	f := frame{kind: frameHello, flags: flagOK, n: handoffLowest<<16 | handoffHighest, id: h.id, at: place{network: helloName, space: h.space}, sub: strconv.Itoa(os.Getpid())}
	if h.settled {
		f.flags |= flagSettled
	}
	if h.pool.keeper {
		f.flags |= flagKeeper
	}
	return f
}

// announce makes this process found by the others, if it isn't. It is called by
// openHandoff, and then by the look alone.
func (h *handoff) announce() error {
	ln, err := announce(h.path, h.id)
	if err != nil {
		return err
	}
	h.mu.Lock()
	if h.quit.Err() != nil {
		h.mu.Unlock()
		os.Remove(h.name()) // nobody else does
		return cmp.Or(ln.Close(), h.quit.Err())
	}
	before := h.ln
	h.ln, h.file = ln, fileKeyAt(h.name())
	h.wg.Add(1)
	h.mu.Unlock()
	go h.accept(ln)
	if before != nil {
		before.Close()
	}
	return nil
}

// name is the file of this process.
func (h *handoff) name() string { return filepath.Join(h.path, h.id.String()) }

// accept accepts links until the listener is closed.
func (h *handoff) accept(ln *net.UnixListener) {
	defer h.wg.Done()
	for {
		c, err := ln.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err == nil && !h.begin():
			c.Close()
		case err == nil:
			l := &link{h: h, c: c}
			c.SetReadDeadline(time.Now().Add(exchangeTime)) // for the hello
			go h.serve(l)
		case (errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE)) && h.useReserve():
		default:
			select {
			case <-h.quit.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

// begin counts a link in.
func (h *handoff) begin() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.quit.Err() != nil || h.conns >= mostLinks {
		return false
	}
	h.conns++
	h.wg.Add(1)
	return true
}

// takeReserveLocked takes the descriptor that is held for peers, if it is there to be
// had. It is that of a socket, which knows the network namespace of this process.
func (h *handoff) takeReserveLocked() {
	if h.reserve != nil {
		return
	}
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return
	}
	unix.CloseOnExec(fd)
	h.reserve, h.space = newDescriptor(fd), factsOf(uintptr(fd)).space
}

// useReserve closes the descriptor that is held for peers, so that one can link.
func (h *handoff) useReserve() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	had := h.reserve != nil
	h.reserve.release()
	h.reserve = nil
	return had
}

// look dials whoever is in the directory and has no link.
func (h *handoff) look() error {
	ids, err := processesIn(h.path)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil || h.quit.Err() != nil {
		return err
	}
	for x := range h.strangers {
		if !slices.Contains(ids, x) {
			delete(h.strangers, x)
		}
	}
	for x, l := range h.dialing {
		if l.over && !slices.Contains(ids, x) {
			delete(h.dialing, x)
			h.pool.lacks = true
		}
	}
	for _, x := range ids {
		if x == h.id || h.links[x] != nil || h.dialing[x] != nil && !h.dialing[x].over || h.strangers[x] != nil || h.conns >= mostLinks {
			continue
		}
		l := &link{h: h, peer: x, dialed: true}
		h.dialing[x] = l
		h.conns++
		h.wg.Add(1)
		go h.dial(l)
	}
	h.turnedLocked()
	return nil
}

// dial makes a link. A file that refuses is of a process that is dead.
func (h *handoff) dial(l *link) {
	name := filepath.Join(h.path, l.peer.String())
	var dialer net.Dialer
	c, err := dialer.DialContext(h.quit, "unix", name)
	h.mu.Lock()
	if err == nil {
		l.c = c.(*net.UnixConn)
		l.send(parcel{frame: h.helloLocked()})
	}
	h.mu.Unlock()
	if err == nil {
		h.serve(l)
		return
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(name)
	}
	defer h.wg.Done()
	h.mu.Lock()
	h.endLocked(l)
	h.retry = h.retry || !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT)
	h.mu.Unlock()
	h.apply()
}

// endLocked counts a link out.
func (h *handoff) endLocked(l *link) {
	if h.dialing[l.peer] == l && !l.over {
		delete(h.dialing, l.peer)
		h.pool.lacks = true // it didn't get to its hello
	}
	h.conns--
	h.turnedLocked()
}

// serve reads a link until it ends.
func (h *handoff) serve(l *link) {
	defer h.wg.Done()
	defer context.AfterFunc(h.quit, func() { l.c.Close() })()
	r := &frameReader{c: l.c}
	err := h.greet(l, r)
	for err == nil {
		err = h.hear(l, r)
	}
	h.mu.Lock()
	l.over = err == errTwice && l.dialed
	left := h.links[l.peer] == l && !errors.Is(err, errFrame)
	h.retry = h.retry || !left // by the next look: it may fail in the same way at once
	if h.links[l.peer] == l {
		// Whoever is dead has closed it; whoever is stopped has done nothing.
		h.goneLocked(l)
		switch {
		case h.quit.Err() != nil:
		case errors.Is(err, errFrame):
			h.sayLocked(h.log, trouble, "a process of the handoff was dropped", "path", h.path, "process", l.peer, "reason", err)
		default:
			h.sayLocked(h.log, news, "a process left the handoff", "path", h.path, "process", l.peer, "others", len(h.links))
		}
	}
	h.endLocked(l)
	h.mu.Unlock()
	h.apply()
	if left {
		h.poke() // is its file there still?
	}
	l.close()
	r.drain()
}

// goneLocked ends a link that was one of the handoff's.
func (h *handoff) goneLocked(l *link) {
	delete(h.links, l.peer)
	h.pool.gone(l.peer, !l.full)
	for _, q := range h.questions {
		delete(q.waiting, l.peer)
	}
	h.turnedLocked()
}

// greet hears who the other process is, and makes the link one of the handoff's.
func (h *handoff) greet(l *link, r *frameReader) error {
	p, err := r.next()
	if err != nil {
		return err
	}
	p.d.release()
	if p.kind != frameHello || p.at.network != helloName || p.id == h.id {
		return errFrame
	}
	l.c.SetReadDeadline(time.Time{})
	if p.flags&flagObserver != 0 {
		return h.showObserver(l, r)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.admitLocked(l, p.frame); err != nil {
		return err
	}
	h.links[l.peer] = l
	for _, f := range h.pool.meet(l.peer) {
		l.send(parcel{frame: f})
	}
	h.pool.peers[l.peer].keeper = p.flags&flagKeeper != 0
	h.sayLocked(h.log, news, "a process joined the handoff", "path", h.path, "process", l.peer, "others", len(h.links))
	h.turnedLocked()
	return nil
}

// errTwice: the other link of the pair is to be used.
var errTwice = errors.New("another link of the pair stays")

// admitLocked tells whether a link is to be one of the handoff's. Of two between one
// pair the one stays that the process with the smaller id has dialled.
func (h *handoff) admitLocked(l *link, hello frame) error {
	switch {
	case l.dialed && (h.dialing[l.peer] != l || hello.id != l.peer):
		return net.ErrClosed // it has dialled too, and that link was taken
	case l.dialed && hello.flags&flagOK == 0:
		return errTwice
	case !l.dialed && h.dialing[hello.id] != nil && !h.dialing[hello.id].over && h.id.less(hello.id):
		no := h.helloLocked()
		no.flags &^= flagOK
		l.send(parcel{frame: no})
		return errTwice
	case !l.dialed:
		l.send(parcel{frame: h.helloLocked()})
		l.peer = hello.id
	}
	delete(h.strangers, l.peer)
	lowest, highest := int(hello.n>>16), int(hello.n&0xffff)
	switch {
	case h.quit.Err() != nil:
		return h.quit.Err()
	case lowest > handoffHighest || highest < handoffLowest:
		h.strangers[l.peer] = fmt.Errorf("a process (pid %s) speaks other versions of the protocol, %d to %d, this one %d to %d", hello.sub, lowest, highest, handoffLowest, handoffHighest)
	case h.space != 0 && hello.at.space != 0 && hello.at.space != h.space:
		h.strangers[l.peer] = fmt.Errorf("%s is used by processes of another network namespace (another container?): give each its own directory", h.path)
		if !h.settled && (hello.flags&flagSettled != 0 || l.peer.less(h.id)) {
			h.foreign = h.strangers[l.peer]
		}
	}
	if why := h.strangers[l.peer]; why != nil {
		h.sayLocked(h.log, trouble, "a process can't be one of the handoff", "path", h.path, "process", l.peer, "reason", why)
		return why
	}
	if d := h.dialing[l.peer]; d != nil && d != l && d.c != nil {
		d.c.Close()
	}
	delete(h.dialing, l.peer)
	if old := h.links[l.peer]; old != nil { // the other knows that it is gone
		old.c.Close()
		h.goneLocked(old)
	}
	return nil
}

// hear takes in what came together, and does what follows from it before it gives
// those answers that promise that.
func (h *handoff) hear(l *link, r *frameReader) error {
	var then []parcel
	err := h.hearOne(l, r, &then)
	for err == nil && r.hasMore() {
		err = h.hearOne(l, r, &then)
	}
	if err == nil {
		h.apply()
		for _, p := range then {
			l.send(p)
		}
	}
	return err // serve applies
}

func (h *handoff) hearOne(l *link, r *frameReader, then *[]parcel) error {
	p, err := r.next()
	if err != nil {
		return err
	}
	defer p.d.release()
	var bad error
	if p.d != nil {
		bad = checkReceived(p.d, p.at)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.links[l.peer] != l {
		return net.ErrClosed
	}
	if bad != nil {
		h.sayLocked(h.log, trouble, "a descriptor of the handoff was refused", "path", h.path, "process", l.peer, "reason", bad)
		p.d = nil
	}
	if peer := h.pool.peers[l.peer]; peer.silent {
		peer.silent = false
		h.sayLocked(h.log, news, "a process of the handoff answers again", "path", h.path, "process", l.peer)
	}
	now, later := h.pool.hear(l.peer, p)
	for _, p := range now {
		l.send(p)
	}
	*then = append(*then, later...)
	if q := h.questions[p.n]; q != nil && p.kind == frameAnswer && q.waiting[l.peer] {
		delete(q.waiting, l.peer)
		if p.flags&flagOK != 0 {
			q.yes++
		} else {
			q.no++
		}
	}
	h.turnedLocked()
	return nil
}

// tellLocked says something to everybody.
func (h *handoff) tellLocked(f frame) {
	for _, l := range h.links {
		l.send(parcel{frame: f})
	}
}

// turnedLocked has whoever awaits something look again.
func (h *handoff) turnedLocked() {
	h.pool.unheard = len(h.dialing)
	if h.awaiting > 0 {
		close(h.turn)
		h.turn = make(chan struct{})
	}
}
