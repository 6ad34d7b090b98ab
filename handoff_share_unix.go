//go:build unix && !aix

package lblisten

// apply: which sockets of a handoff's pool the addresses of this process serve, compared
// with which they are to serve. What an address does with one is in inherit.go.

import "errors"

// A step is a socket that an address is to share, or to take back.
type step struct {
	s *pooled
	a *address
}

// apply shares with each address what it is to serve, and takes back what another
// process serves again. It compares what should be with what is, so it can be called
// at any time.
func (h *handoff) apply() {
	h.applying.Lock()
	defer h.applying.Unlock()
	share, back := h.steps()
	for _, x := range back {
		x.a.takeBack(x.s)
	}
	for _, x := range share {
		h.share(x.s, x.a)
		x.s.d.release()
	}
}

// steps returns what is to be done, with a use of each descriptor that is to be
// shared, and closes what was dropped.
func (h *handoff) steps() (share, back []step) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.pool.sockets {
		if !s.bound && !h.pool.isServed(s) {
			// Its process has died, or stopped, before it told that it listens, or before it did.
			if s.bound = listens(s.d.fd); s.bound && s.at.isNew() {
				s.at = s.at.bySocket(s.d.fd)
			}
			if !s.bound && !h.pool.isOwned(s) {
				h.pool.forget(s)
			}
			if !s.bound {
				continue
			}
		}
		a := h.addresses[s.at]
		if a == nil || s.mine || !s.bound || s.balanced != (a.d == nil) {
			continue
		}
		if !s.checked {
			if err := checkBalanced(s, a.at); err != nil {
				h.sayLocked(a.log, trouble, "a socket of the handoff can't be used", "path", h.path, "address", a.at, "reason", err)
				h.pool.forget(s)
				h.tellLocked(frame{kind: frameAnswer, id: s.id})
				continue
			}
			s.checked = true
		}
		switch free := h.pool.isFree(s); {
		case free && !s.shared:
			s.shared = true
			s.d.hold()
			share = append(share, step{s, a})
		case !free && s.shared:
			s.shared = false
			back = append(back, step{s, a})
		}
	}
	for _, s := range h.pool.dropped {
		if a := h.addresses[s.at]; s.shared && a != nil {
			back = append(back, step{s, a})
		}
		s.shared = false
		s.d.release()
	}
	h.pool.dropped = nil
	for _, f := range h.pool.broadcast() {
		h.tellLocked(f)
	}
	return share, back
}

// checkBalanced checks that a socket of the pool is what it is said to be.
func checkBalanced(s *pooled, at place) error {
	if s.balanced && !isBalanced(uintptr(s.d.fd)) {
		return errors.New("a socket that the kernel doesn't balance")
	}
	return checkListening(s.d.fd, at, s.sub)
}

// share has an address share a socket.
func (h *handoff) share(s *pooled, a *address) {
	sock, err := h.open(s, a)
	if err == nil && !a.inherit(sock) {
		sock.ln.Close() // the address ends, and leaves the handoff
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		h.sayLocked(a.log, news, "this process serves a socket that nobody else is known to accept from", "path", h.path, "address", a.at)
		return
	}
	s.shared = false // the next look tries again
	h.sayLocked(a.log, trouble, "a socket of the handoff can't be served for now", "path", h.path, "address", a.at, "reason", err)
}

// open makes a listening socket of an address out of one of the pool.
func (h *handoff) open(s *pooled, a *address) (*socket, error) {
	ln, err := listenerOf(s.d)
	if err != nil {
		return nil, err
	}
	sock, err := newSocket(ln, s.sub, s)
	if err != nil {
		ln.Close()
		return nil, err
	}
	sock.received, sock.file = true, s.file
	return sock, nil
}
