//go:build unix && !aix

package lblisten

// What the hub of a handoff knows of its processes and their sockets, and whom it
// tells what. How a process connects, and how the hub begins and ends, isn't known
// here: that is in handoff_hub_unix.go. A hub never accepts from a socket.

import (
	"net"
	"time"
)

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
		h.noteLocked(p, f)
	case frameSynced:
		p.asked = true
		h.expected = max(h.expected, int(f.n)-1) // of them the hub before is gone
		delete(h.missing, p.process)
		h.syncAllLocked()
	case frameSocket:
		h.receiveLocked(p, f, d)
	case frameOwner:
		h.claimLocked(p, f)
	case frameDrop:
		if s != nil && (s.by == p || s.owner == p) {
			h.dropLocked(s)
		}
	case frameBound:
		if s != nil && (s.by == p || s.owner == p) && s.f.at.port == 0 {
			s.f.at = f.at
			h.tellLocked(p, frame{kind: frameBound, id: f.id, at: f.at})
		}
	case frameOn:
		p.on[f.at] = true
		h.recountLocked(f.at)
		reply(p, f.n, flagOK)
	case frameOff:
		reply(p, f.n, h.offLocked(p, f.at))
	case frameReply:
		if dep := h.pending[f.n]; dep != nil {
			h.confirmedLocked(f.n, dep, p)
		}
		p.slow = false
	}
	return nil
}

// noteLocked notes that a peer holds a socket, and asks for it if it isn't here.
func (h *hub) noteLocked(p *hubPeer, f frame) {
	if !p.synced {
		p.has[f.id] = f.flags&flagMine != 0
	}
	if h.young && f.process != (processID{}) && h.peerLocked(f.process) == nil {
		h.missing[f.process] = true
	}
	switch s := h.sockets[f.id]; {
	case s != nil && f.flags&flagMine != 0 && (s.owner == nil || s.owner.process == p.process):
		h.ownLocked(p, s)
	case s == nil && h.wanted[f.id] == nil:
		h.wantLocked(p, f.id)
	}
}

// receiveLocked deposits a socket that a peer sends, unless it is here already or
// there is no room for it.
func (h *hub) receiveLocked(p *hubPeer, f frame, d *descriptor) {
	delete(h.wanted, f.id)
	defer h.syncAllLocked()
	switch {
	case h.sockets[f.id] != nil:
		reply(p, f.n, flagOK)
	// Descriptors are for this process's own connections first.
	case p.owns >= handoffMost, len(h.sockets) >= handoffSockets*handoffPeers, isScarce(d.fd), checkReceived(d, f.at) != nil:
		reply(p, f.n, 0)
	default:
		h.depositLocked(p, f, d)
	}
}

// claimLocked: a peer wants to accept from a socket, or doesn't any more.
func (h *hub) claimLocked(p *hubPeer, f frame) {
	s := h.sockets[f.id]
	switch {
	case f.flags&flagMine == 0:
		if s != nil && s.owner == p {
			h.ownLocked(nil, s)
		}
	case s == nil, s.owner != nil && s.owner != p, p.owns >= handoffMost:
		reply(p, f.n, 0)
	default:
		h.ownLocked(p, s)
		reply(p, f.n, flagOK)
	}
}

func reply(p *hubPeer, n uint32, flags byte) {
	if n != 0 {
		p.w.send(frame{kind: frameReply, n: n, flags: flags}, nil)
	}
}

// tellLocked sends a frame to every peer but one. Those that aren't synced are told
// everything when they are.
func (h *hub) tellLocked(but *hubPeer, f frame) {
	for p := range h.peers {
		if p != but && p.synced {
			p.w.send(f, nil)
		}
	}
}

func (h *hub) ownLocked(p *hubPeer, s *hubSocket) {
	if s.owner != nil {
		s.owner.owns--
	}
	f := frame{kind: frameOwner, id: s.f.id}
	s.owner = p
	if p != nil {
		p.owns++
		f.process = p.process
	}
	h.tellLocked(nil, f)
}

func (h *hub) dropLocked(s *hubSocket) {
	if s.owner != nil {
		s.owner.owns--
	}
	delete(h.sockets, s.f.id)
	s.d.release()
	h.tellLocked(nil, frame{kind: frameDrop, id: s.f.id})
}

// socketFrameLocked is how a peer is told of a socket.
func socketFrameLocked(s *hubSocket, n uint32) frame {
	f := s.f
	f.kind, f.n, f.flags = frameSocket, n, f.flags&flagBalanced
	f.process = processID{}
	if s.owner != nil {
		f.process = s.owner.process
	}
	return f
}

// depositLocked keeps a new socket, passes it on, and answers when all have it.
func (h *hub) depositLocked(p *hubPeer, f frame, d *descriptor) {
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
			q.w.send(socketFrameLocked(s, n), d)
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
			h.confirmedLocked(n, dep, q)
		}
	})
}

// confirmedLocked takes a peer off those that a deposit waits for.
func (h *hub) confirmedLocked(n uint32, dep *deposit, p *hubPeer) {
	delete(dep.wait, p)
	if len(dep.wait) == 0 && h.pending[n] == dep {
		dep.timer.Stop()
		delete(h.pending, n)
		reply(dep.from, dep.n, flagOK)
	}
}

// wantLocked asks a peer for a socket that it has.
func (h *hub) wantLocked(p *hubPeer, id socketID) {
	if len(h.wanted) == 0 {
		time.AfterFunc(gatherTime, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			clear(h.wanted)
			h.syncAllLocked()
		})
	}
	h.wanted[id] = p
	p.w.send(frame{kind: frameWant, id: id}, nil)
}

// completeLocked tells whether everything is known that there is to know.
func (h *hub) completeLocked() bool {
	if h.young {
		came := 0
		for p := range h.peers {
			if p.hasComeLocked() {
				came++
			}
		}
		if came < h.expected || len(h.missing) > 0 {
			return false
		}
	}
	return len(h.wanted) == 0
}

// hasComeLocked tells whether a peer can be one that the hub before knew, and has
// said all that it holds.
func (p *hubPeer) hasComeLocked() bool { return p.asked && (p.synced || len(p.has) > 0) }

// peerLocked returns the peer of a process that has said all that it holds.
func (h *hub) peerLocked(process processID) *hubPeer {
	for p := range h.peers {
		if p.asked && p.process == process {
			return p
		}
	}
	return nil
}

// syncAllLocked tells those that asked what they don't know, once everything is known.
func (h *hub) syncAllLocked() {
	if h.closed || !h.completeLocked() {
		return
	}
	for p := range h.peers {
		if p.asked && !p.synced {
			h.syncLocked(p)
		}
	}
}

func (h *hub) syncLocked(p *hubPeer) {
	for id, s := range h.sockets {
		if _, has := p.has[id]; !has {
			p.w.send(socketFrameLocked(s, 0), s.d)
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
	h.countedLocked()
	for at := range p.on {
		h.recountLocked(at)
	}
}

// countedLocked has the number of processes written into the lock file.
func (h *hub) countedLocked() {
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

// recountLocked tells the peers on an address how many they are.
func (h *hub) recountLocked(at place) {
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

// onLocked counts the peers on an address that live, also if nobody has read yet
// that one has gone: who is told that others accept leaves them a unix socket's
// file.
func (h *hub) onLocked(at place) int {
	n := 0
	for p := range h.peers {
		if p.on[at] && !p.w.isCut() {
			n++
		}
	}
	return n
}

// offLocked: a peer leaves an address. Its sockets there are anybody's, and if
// nobody is there any more, that is their end. It returns flagOK if somebody is.
func (h *hub) offLocked(p *hubPeer, at place) byte {
	delete(p.on, at)
	others := h.onLocked(at) > 0 || !h.completeLocked() // who knows who comes
	for _, s := range h.sockets {
		switch {
		case s.f.at != at:
		case !others:
			h.dropLocked(s)
		case s.owner == p:
			h.ownLocked(nil, s)
		}
	}
	h.recountLocked(at)
	if others {
		return flagOK
	}
	return 0
}

// leaveLocked: a peer is gone.
func (h *hub) leaveLocked(p *hubPeer) {
	delete(h.peers, p)
	if p.hasComeLocked() {
		h.expected--
	}
	for _, s := range h.sockets {
		if s.by == p {
			s.by = nil
			if !listens(s.d) {
				h.dropLocked(s) // and never will
				continue
			}
		}
		if s.owner == p {
			h.ownLocked(nil, s)
		}
	}
	for n, dep := range h.pending {
		if dep.wait[p] {
			h.confirmedLocked(n, dep, p)
		}
	}
	for id, q := range h.wanted {
		if q == p {
			delete(h.wanted, id)
			for r := range h.peers {
				if _, has := r.has[id]; has {
					h.wantLocked(r, id)
					break
				}
			}
		}
	}
	h.syncAllLocked()
	for at := range p.on {
		h.recountLocked(at)
	}
	if p.synced && !h.closed {
		h.countedLocked()
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
			h.dropLocked(s)
		}
	}
}
