//go:build unix && !aix

package lblisten

// The pool: the sockets of a handoff and its processes, as one of these knows them.
// What a message changes, and what follows from it, is here, without I/O, time or
// locks: a message goes into hear, and what is to be said comes out. Who carries it is
// handoff_link_unix.go; what becomes of a free socket, handoff_unix.go.
//
// Each process speaks for itself alone: that it holds a socket, that it accepts from
// it, that it listens on an address. So nothing has to be agreed on. Accepting twice
// from one socket is harmless, so who owns one is a hint and never a lock.

import "math"

// poolMost is the most sockets that a process takes into its pool.
const poolMost = 1 << 15

// A pool is what one process knows.
type pool struct {
	self    id
	room    func() bool // descriptors are left for the sockets of others
	peers   map[id]*peer
	sockets map[id]*pooled
	on      map[place]bool // where this process listens
	keeper  bool           // it keeps what nobody listens for
	unheard int            // processes that are there and haven't said hello yet: they may own anything

	dropped []*pooled // out of the pool, to be closed
	got     []*pooled // since the last broadcast, when nobody owned them
	refused bool      // a socket, for want of room
	lacks   bool      // somebody went, or dropped a socket, before this process had it: others may have it
}

// A peer is another process with a link to this one.
type peer struct {
	on     map[place]bool
	keeper bool
	silent bool        // it owes an answer: what it owns is served by others meanwhile
	short  bool        // it has refused the last socket that it answered about
	synced bool        // it has told everything
	wants  map[id]bool // sockets that it was asked for
}

// A holding is what a peer is known to have of a socket.
type holding byte

const (
	holds holding = iota + 1 // a duplicate
	owns                     // and it accepts from it
)

// A pooled is a socket of the pool.
type pooled struct {
	id       id
	d        *descriptor
	sub      string // the network of the socket, where a member has two
	balanced bool   // it is one of the kernel's group; otherwise all processes of its address serve it

	at      place          // port 0 until it is known
	file    fileKey        // of a unix socket, once it is bound
	bound   bool           // it listens
	who     map[id]holding // peers only
	mine    bool           // this process accepts from it, or what a member of it left is shared here
	claimed bool           // this process asks the others whether it may
	left    bool           // whoever owned it last is gone; otherwise it may be one that wasn't heard
	shared  bool           // its address in this process shares it
	checked bool           // it is what it is said to be
	queued  int            // looks in a row that found a connection queued
	idle    int            // looks in a row that found nobody on its address
}

func newPool(self id, room func() bool) pool {
	return pool{self: self, room: room, peers: make(map[id]*peer), sockets: make(map[id]*pooled), on: make(map[place]bool)}
}

// frame returns a frame about a socket.
func (s *pooled) frame(kind byte) frame {
	f := frame{kind: kind, id: s.id, at: s.at, sub: s.sub, file: s.file}
	for flag, set := range map[byte]bool{flagBalanced: s.balanced, flagMine: s.mine, flagLeft: s.left, flagBound: s.bound} {
		if set {
			f.flags |= flag
		}
	}
	return f
}

// add adds a socket.
func (p *pool) add(s *pooled) {
	s.who = make(map[id]holding)
	p.sockets[s.id] = s
}

// forget takes a socket out of the pool.
func (p *pool) forget(s *pooled) {
	if p.sockets[s.id] == s {
		delete(p.sockets, s.id)
		p.dropped = append(p.dropped, s)
	}
}

// isOwned tells whether a process with a link owns a socket, one that is silent too.
func (p *pool) isOwned(s *pooled) bool {
	for _, h := range s.who {
		if h == owns {
			return true
		}
	}
	return s.mine
}

// isServed tells whether a process that answers owns a socket.
func (p *pool) isServed(s *pooled) bool {
	for peer, h := range s.who {
		if h == owns && !p.peers[peer].silent {
			return true
		}
	}
	return s.mine
}

// isFree tells whether this process is to serve a socket that is not its own:
// because nobody who answers accepts from it, or because everybody is to.
func (p *pool) isFree(s *pooled) bool {
	if s.mine || !s.bound {
		return false
	}
	return !s.balanced || !p.isServed(s)
}

// isOrphan tells whether nobody owns a socket: nobody with a link, and nobody else
// either.
func (p *pool) isOrphan(s *pooled) bool { return !p.isOwned(s) && (s.left || p.unheard == 0) }

// others tells whether another process listens on an address, or keeps its sockets.
func (p *pool) others(at place) bool {
	for _, peer := range p.peers {
		if peer.on[at] || peer.keeper {
			return true
		}
	}
	return false
}

// isKept tells whether the sockets of an address are anybody's.
func (p *pool) isKept(at place) bool { return p.on[at] || p.keeper || p.others(at) }

// isWanted tells whether anybody who holds a socket may have a use for it.
func (p *pool) isWanted(s *pooled) bool {
	wanted := p.on[s.at] || p.keeper
	for with := range s.who {
		wanted = wanted || p.peers[with].on[s.at] || p.peers[with].keeper
	}
	return s.bound && wanted
}

// hasAll tells whether a peer has every socket that this process has.
func (p *pool) hasAll(peer id) bool {
	for _, s := range p.sockets {
		if s.who[peer] == 0 {
			return false
		}
	}
	return true
}

// holdsAll tells whether a peer has every socket of this process on an address.
func (p *pool) holdsAll(peer id, at place) bool {
	for _, s := range p.sockets {
		if s.mine && s.at == at && s.who[peer] == 0 {
			return false
		}
	}
	return true
}

// isHandedOver tells whether somebody who takes over an address has all of its sockets but
// those that their owner serves, or nobody is to get more of them than it has.
func (p *pool) isHandedOver(at place) bool {
	over := true
	for x, peer := range p.peers {
		if peer.silent || peer.short || !peer.on[at] && !peer.keeper {
			continue
		}
		over = true
		for _, s := range p.sockets {
			over = over && (s.at != at || !s.bound || s.who[x] != 0 || p.isServed(s))
		}
		if over {
			return true
		}
	}
	return over
}

// meet is the begin of a link. It returns what this process says first.
func (p *pool) meet(with id) (say []frame) {
	p.peers[with] = &peer{on: make(map[place]bool), wants: make(map[id]bool)}
	for at := range p.on { // first of all: no process may think that it is the last one there
		say = append(say, frame{kind: frameOn, at: at})
	}
	if p.keeper {
		say = append(say, frame{kind: frameKeeper, flags: flagOK})
	}
	for _, s := range p.sockets {
		if s.mine || p.isOrphan(s) { // an owner says so itself
			say = append(say, s.frame(frameHas))
		}
	}
	return append(say, frame{kind: frameSynced})
}

// all is all that this process holds.
func (p *pool) all() (say []frame) {
	for _, s := range p.sockets {
		say = append(say, s.frame(frameHas))
	}
	return append(say, frame{kind: frameSynced})
}

// gone is the end of a link; dead is false if the process may live.
func (p *pool) gone(with id, dead bool) {
	p.lacks = p.lacks || !p.peers[with].synced || len(p.peers[with].wants) > 0
	delete(p.peers, with)
	for _, s := range p.sockets {
		p.disown(s, with, dead)
		delete(s.who, with)
	}
}

// broadcast returns what to say to everybody: that this process lacks something, and
// that it has got what nobody owns, which others may lack.
func (p *pool) broadcast() (say []frame) {
	for _, s := range p.got {
		if p.sockets[s.id] == s && !p.isOwned(s) {
			say = append(say, s.frame(frameHas))
		}
	}
	p.got = nil
	if p.lacks {
		p.lacks = false
		for _, peer := range p.peers {
			peer.synced = false
		}
		say = append(say, frame{kind: frameTell})
	}
	return say
}

// disown ends what a peer owned.
func (p *pool) disown(s *pooled, of id, left bool) {
	if s.who[of] == owns {
		s.who[of] = holds
		s.left = left
	}
}

// hear takes in what a peer says. It returns the answers: those to be given at once,
// and those that are to wait until this process serves what it is to serve.
func (p *pool) hear(from id, m parcel) (now []parcel, then []parcel) {
	peer, s := p.peers[from], p.sockets[m.id]
	say := func(f frame) { now = append(now, parcel{frame: f}) }
	answer := func(s id, ok bool) {
		f := frame{kind: frameAnswer, n: m.n, id: s}
		if ok {
			f.flags = flagOK
		}
		say(f)
	}
	switch m.kind {
	case frameOn:
		if len(peer.on) < poolMost {
			peer.on[m.at] = true
		}
	case frameOff:
		p.hearOff(from, m.at)
		answer(id{}, p.on[m.at] || p.keeper)
		now, then = nil, now
	case frameHas, frameSocket:
		now = p.hearHas(from, m)
	case frameWant:
		if s == nil {
			say(frame{kind: frameDrop, id: m.id})
			break
		}
		f := s.frame(frameSocket)
		f.n = m.n
		now = append(now, parcel{f, s.d})
	case frameDrop:
		p.hearDrop(from, m.id)
	case frameBound:
		if s != nil && !s.mine {
			s.at, s.file, s.bound = m.at, m.file, true
		}
	case frameClaim:
		answer(id{}, s == nil || !s.mine && !(s.claimed && p.self.less(from)) && !p.isOwnedBut(s, from))
	case frameRelease:
		if s != nil {
			p.disown(s, from, true)
		}
	case frameKeeper:
		peer.keeper = m.flags&flagOK != 0
	case frameAsk:
		answer(id{}, true)
	case frameTell:
		for _, f := range p.all() {
			say(f)
		}
	case frameSynced:
		peer.synced = true
	case frameAnswer:
		if s != nil {
			p.hearHolds(from, s, m.flags&flagOK != 0)
		}
	}
	return now, then
}

// hearHolds: a peer answers that it holds a socket, or refuses it.
func (p *pool) hearHolds(from id, s *pooled, does bool) {
	p.peers[from].short = !does
	if !does {
		delete(s.who, from)
	} else if s.who[from] == 0 {
		s.who[from] = holds
	}
}

// hearOff: a peer doesn't listen on an address any more.
func (p *pool) hearOff(from id, at place) {
	delete(p.peers[from].on, at)
	kept := p.isKept(at)
	for _, s := range p.sockets {
		if s.at == at {
			p.disown(s, from, true)
			if !kept && p.isOrphan(s) {
				p.forget(s)
			}
		}
	}
}

// hearHas: a peer has a socket, or sends it. It returns what is answered.
func (p *pool) hearHas(from id, m parcel) (now []parcel) {
	peer, s := p.peers[from], p.sockets[m.id]
	if m.kind == frameSocket {
		delete(peer.wants, m.id)
	}
	answer := frame{kind: frameAnswer, n: m.n, id: m.id, flags: flagOK}
	switch {
	case s != nil:
		p.note(s, from, m.frame)
	case m.kind == frameHas && m.flags&flagMine == 0 && p.isComing(m.id):
		return nil // if it doesn't come, everybody is asked
	case m.kind == frameSocket && m.d == nil: // it isn't what it was said to be, or was cut off for want of room
		p.refused = p.refused || !p.room()
		answer.flags = 0
	case len(p.sockets) >= poolMost || !p.room():
		p.refused = true
		answer.flags = 0
	case m.kind == frameHas:
		peer.wants[m.id] = true
		answer = frame{kind: frameWant, n: m.n, id: m.id}
	default:
		s = &pooled{id: m.id, d: m.d.hold(), at: m.at, sub: m.sub, balanced: m.flags&flagBalanced != 0}
		p.add(s)
		p.note(s, from, m.frame)
		if !p.isOwned(s) {
			p.got = append(p.got, s)
		}
	}
	return []parcel{{frame: answer}}
}

// hearDrop: a peer doesn't hold a socket any more.
func (p *pool) hearDrop(from, socket id) {
	peer, s := p.peers[from], p.sockets[socket]
	p.lacks = p.lacks || peer.wants[socket]
	delete(peer.wants, socket)
	if s == nil {
		return
	}
	p.disown(s, from, true)
	delete(s.who, from)
	if !s.mine && !p.isWanted(s) {
		p.forget(s)
	}
}

// isComing tells whether a peer was asked for a socket.
func (p *pool) isComing(s id) bool {
	for _, peer := range p.peers {
		if peer.wants[s] && !peer.silent {
			return true
		}
	}
	return false
}

// note takes in what a peer says of a socket that it has.
func (p *pool) note(s *pooled, from id, f frame) {
	if f.flags&flagBound != 0 && !s.bound {
		s.at, s.file, s.bound = f.at, f.file, true
	}
	switch {
	case f.flags&flagMine != 0:
		s.who[from], s.left = owns, false
	default:
		s.who[from] = holds
		s.left = s.left || f.flags&flagLeft != 0
	}
}

// isOwnedBut tells whether this process knows of an owner other than one.
func (p *pool) isOwnedBut(s *pooled, but id) bool {
	for peer, h := range s.who {
		if h == owns && peer != but {
			return true
		}
	}
	return false
}

// look is the once-a-second look at sockets that nobody is left for: they are kept for
// a while, and by a keeper for as long as it wants to, 0 for ever. It returns those that
// are let go.
func (p *pool) look(units, while, keeperWhile int) (let []*pooled) {
	if p.keeper && keeperWhile == 0 {
		keeperWhile = math.MaxInt
	}
	for _, s := range p.sockets {
		s.idle += units
		switch {
		case s.mine, p.unheard > 0, p.on[s.at]:
			s.idle = 0
		case p.keeper && !p.isListenedTo(s.at):
			if s.idle >= keeperWhile {
				let = append(let, s)
			}
		case p.others(s.at):
			s.idle = 0
		case s.idle >= while:
			let = append(let, s)
		}
	}
	for _, s := range let {
		p.forget(s)
	}
	return let
}

// isListenedTo tells whether a process listens on an address.
func (p *pool) isListenedTo(at place) bool {
	for _, peer := range p.peers {
		if peer.on[at] {
			return true
		}
	}
	return p.on[at]
}
