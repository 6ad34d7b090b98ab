//go:build unix && !aix

package lblisten

// The link of a process to the hub of its handoff: how it connects, or becomes the
// hub itself, what the two tell each other, and how long anybody waits for an
// answer. It doesn't know what becomes of the sockets (handoff_pool_unix.go), nor
// how frames are written and read (handoff_wire_unix.go).

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

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
				log(h.log, routine, "this process is the hub of the handoff", "path", h.path)
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
			h.forgetLocked(p) // others hold it, and descriptors are for this process's own first
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
	h.turnedLocked()
}

// turnedLocked tells who waits for a turn, and has what is shared settled anew.
func (h *handoff) turnedLocked() {
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
				log(h.log, trouble, "a descriptor of the handoff was refused", "path", h.path, "reason", err)
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
			log(h.log, trouble, "the hub of the handoff is gone; until another answers, this process serves all sockets", "path", h.path, "reason", err)
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
		w.send(frame{kind: frameHas, flags: p.flagsLocked(), id: p.id, process: p.owner, at: p.at, sub: p.sub}, nil)
		p.owner = processID{} // unless the hub says so again
		p.isKept = true       // unless the hub wants it
	}
	for at := range h.addresses { // first of all: no process may think that it is the last one there
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
		return h.receiveLocked(w, f, d)
	case frameWant:
		if p != nil {
			p.isKept = false
			h.giveLocked(p)
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
		case p.role == roleOwned: // it can't know
			p.isKept = false
			h.giveLocked(p)
		default:
			h.forgetLocked(p)
		}
	case framePeers:
		h.peers[f.at] = int(f.n)
	case frameSynced:
		h.toldLocked()
	case frameReply:
		if answer := h.answers[f.n]; answer != nil {
			delete(h.answers, f.n)
			answer(f.flags&flagOK != 0, true)
		}
	}
	return nil
}

// receiveLocked takes a socket that the hub passes on into the pool, and confirms
// it. It returns why the socket was refused.
func (h *handoff) receiveLocked(w *wire, f frame, d *descriptor) error {
	p := h.sockets[f.id]
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
	return nil
}

// toldLocked notes that the hub has told everything.
func (h *handoff) toldLocked() {
	h.synced, h.alone, h.why = true, false, nil
	clear(h.peers) // the hub counts anew, after this
	for _, p := range h.sockets {
		p.fresh = false
		if p.isKept {
			p.keepLocked()
		}
	}
	h.turnedLocked()
}

// askLocked sends a frame that wants an answer. Answer is called with the lock, too;
// answered is false if there is no hub (any more).
func (h *handoff) askLocked(f frame, d *descriptor, answer func(ok, answered bool)) {
	if h.w == nil {
		answer(false, false)
		return
	}
	h.lastN = max(1, h.lastN+1)
	f.n = h.lastN
	h.answers[f.n] = answer
	h.w.send(f, d)
}

// giveLocked deposits a socket with the hub.
func (h *handoff) giveLocked(p *pooled) {
	h.askLocked(frame{kind: frameSocket, flags: p.flagsLocked(), id: p.id, at: p.at, sub: p.sub}, p.d, func(ok, answered bool) {
		if answered {
			p.keepLocked()
			p.isKept = ok
		}
	})
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
				h.turnedLocked()
			}
			h.mu.Unlock()
			return fmt.Errorf("no answer within %v", exchangeTime)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
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
		h.askLocked(f, nil, func(ok, really bool) {
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
