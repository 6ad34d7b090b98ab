//go:build unix && !aix

package lblisten

// What a message changes in the pool, and what follows from it: no process, socket or
// time is needed for that.

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// A poolSim is a handoff of pools, whose messages are under way until they are delivered.
type poolSim struct {
	t     testing.TB
	nodes []*simNode
	made  int                // sockets
	wire  map[[2]int][]frame // from, to
}

// A simNode is one process.
type simNode struct {
	pool
	dead, stopped bool
	leaving       place // an off that waits for answers
	answers, yes  int
}

func newPoolSim(t testing.TB, n int) *poolSim {
	s := &poolSim{t: t, wire: make(map[[2]int][]frame)}
	for range n {
		s.start()
	}
	return s
}

// start starts a process, which links to all others.
func (s *poolSim) start() int {
	n := len(s.nodes)
	s.nodes = append(s.nodes, &simNode{pool: newPool(id{byte(n + 1)}, func() bool { return true })})
	for k, other := range s.nodes[:n] {
		if !other.dead {
			s.send(n, k, s.nodes[n].meet(other.self)...)
			s.send(k, n, other.meet(s.nodes[n].self)...)
		}
	}
	return n
}

func (s *poolSim) send(from, to int, fs ...frame) {
	s.wire[[2]int{from, to}] = append(s.wire[[2]int{from, to}], fs...)
}

func (s *poolSim) tell(from int, f frame) {
	for k, other := range s.nodes {
		if k != from && !other.dead {
			s.send(from, k, f)
		}
	}
}

// deliver delivers one message, and says whether there was one.
func (s *poolSim) deliver(from, to int) bool {
	q := s.wire[[2]int{from, to}]
	if len(q) == 0 || s.nodes[to].dead || s.nodes[to].stopped {
		return false
	}
	s.wire[[2]int{from, to}] = q[1:]
	a, b := s.nodes[from], s.nodes[to]
	if b.peers[a.self] == nil {
		return true // the link is gone
	}
	m := parcel{frame: q[0]}
	if m.kind == frameSocket {
		m.d = newDescriptor(-1)
	}
	b.peers[a.self].silent = false
	now, then := b.hear(a.self, m)
	s.settle(to)
	for _, p := range append(now, then...) {
		s.send(to, from, p.frame)
	}
	if m.kind == frameAnswer && m.n == 1 && b.answers > 0 {
		b.answers--
		if m.flags&flagOK != 0 {
			b.yes++
		}
		s.left(to)
	}
	return true
}

// settle drops what never listened, and asks for what is lacking, as apply does.
func (s *poolSim) settle(node int) {
	n := s.nodes[node]
	for _, f := range n.broadcast() {
		s.tell(node, f)
	}
	for _, s := range n.sockets {
		if !s.bound && !n.isOwned(s) {
			n.forget(s)
		}
	}
	n.dropped = nil
}

// deliverAll delivers everything.
func (s *poolSim) deliverAll() {
	for again := true; again; {
		again = false
		for from := range s.nodes {
			for to := range s.nodes {
				again = s.deliver(from, to) || again
			}
		}
	}
}

// listen has a process listen, with a socket of its own.
func (s *poolSim) listen(n, port int) *pooled {
	at := place{network: "tcp4", host: "127.0.0.1", port: port}
	if !s.nodes[n].on[at] {
		s.nodes[n].on[at] = true
		s.tell(n, frame{kind: frameOn, at: at})
	}
	s.made++
	sock := &pooled{id: id{byte(n + 1), byte(s.made)}, at: at, sub: "tcp4", balanced: true, mine: true}
	s.nodes[n].add(sock)
	s.tell(n, sock.frame(frameHas))
	return sock
}

func (s *poolSim) bind(n int, sock *pooled) {
	sock.bound = true
	s.tell(n, sock.frame(frameBound))
}

// leave begins to leave an address; left goes on when all have answered.
func (s *poolSim) leave(n int, at place) {
	node := s.nodes[n]
	delete(node.on, at)
	for _, sock := range node.sockets {
		if sock.at == at {
			sock.left = sock.left || sock.mine
			sock.mine = false
		}
	}
	node.leaving, node.answers, node.yes = at, len(node.peers), 0
	s.tell(n, frame{kind: frameOff, n: 1, at: at})
	s.left(n)
}

func (s *poolSim) left(n int) {
	node := s.nodes[n]
	if node.answers > 0 || node.yes > 0 || node.keeper {
		return
	}
	for _, sock := range node.sockets {
		if sock.at == node.leaving && node.isOrphan(sock) {
			node.forget(sock)
		}
	}
	node.dropped = nil
}

// kill ends a process; what it has said is heard.
func (s *poolSim) kill(n int) {
	for k := range s.nodes {
		for s.deliver(n, k) {
		}
	}
	dead := s.nodes[n]
	dead.dead = true
	for k, other := range s.nodes {
		if k != n && !other.dead && other.peers[dead.self] != nil {
			other.gone(dead.self, true)
			s.settle(k)
			if other.answers > 0 {
				other.answers--
				s.left(k)
			}
		}
	}
}

// check: when everything is said and heard, all agree.
func (s *poolSim) check() {
	t := s.t
	s.deliverAll()
	for _, a := range s.nodes {
		if a.dead {
			continue
		}
		for _, sock := range a.sockets {
			owners := 0
			for _, b := range s.nodes {
				if there := b.sockets[sock.id]; !b.dead && there != nil && there.mine {
					owners++
					if a != b {
						require.Equal(t, owns, sock.who[b.self], "%v isn't known to own %v", b.self, sock.id)
					}
				}
			}
			require.Equal(t, owners > 0, a.isOwned(sock), "%v", sock.id)
			require.Equal(t, owners == 0 && sock.bound, a.isFree(sock), "%v", sock.id)
			if owners == 0 {
				require.True(t, a.isOrphan(sock), "nobody may adopt %v", sock.id)
			}
			for _, b := range s.nodes {
				if !b.dead && b.sockets[sock.id] == nil {
					require.False(t, b.on[sock.at], "%v listens on the address of %v and doesn't hold it", b.self, sock.id)
				}
			}
		}
	}
}

// What follows from what a process does, for the others.
func TestPool(t *testing.T) {
	at := place{network: "tcp4", host: "127.0.0.1", port: 80}
	for _, c := range []struct {
		name string
		do   func(s *poolSim, sock *pooled) // of process 0; 1 is on the address too, 2 isn't
		hold []bool                         // who holds the socket then
		free []bool                         // who serves it, if it is on the address
	}{
		{"nothing", func(s *poolSim, sock *pooled) {}, []bool{true, true, true}, []bool{false, false, false}},
		{"it is killed", func(s *poolSim, sock *pooled) { s.kill(0) }, []bool{false, true, true}, []bool{false, true, true}},
		{"it leaves", func(s *poolSim, sock *pooled) { s.leave(0, at) }, []bool{true, true, true}, []bool{true, true, true}},
		{"it is silent", func(s *poolSim, sock *pooled) { s.nodes[1].peers[s.nodes[0].self].silent = true }, []bool{true, true, true}, []bool{false, true, false}},
		{"it releases the socket", func(s *poolSim, sock *pooled) {
			sock.mine, sock.left = false, true
			s.tell(0, sock.frame(frameRelease))
		}, []bool{true, true, true}, []bool{true, true, true}},
		{"it withdraws the socket", func(s *poolSim, sock *pooled) {
			sock.mine = false
			s.nodes[0].forget(sock)
			s.tell(0, sock.frame(frameDrop))
		}, []bool{false, true, false}, []bool{false, true, false}}, // 1 may have somebody in its queue
		{"all leave", func(s *poolSim, sock *pooled) { s.leave(0, at); s.deliverAll(); s.leave(1, at) }, []bool{false, false, false}, []bool{false, false, false}},
		{"all leave at once", func(s *poolSim, sock *pooled) { s.leave(0, at); s.leave(1, at) }, []bool{false, false, false}, []bool{false, false, false}},
		{"all leave, a keeper lives", func(s *poolSim, sock *pooled) {
			s.nodes[2].keeper = true
			s.tell(2, frame{kind: frameKeeper, flags: flagOK})
			s.deliverAll()
			s.leave(0, at)
			s.deliverAll()
			s.leave(1, at)
		}, []bool{true, true, true}, []bool{true, true, true}},
		{"all are killed, and wait for the next", func(s *poolSim, sock *pooled) { s.kill(0); s.kill(1) }, []bool{false, false, true}, []bool{false, false, true}},
		{"all are killed, and nobody comes", func(s *poolSim, sock *pooled) {
			s.kill(0)
			s.kill(1)
			for range 30 {
				s.nodes[2].look(1, 30, 0)
			}
		}, []bool{false, false, false}, []bool{false, false, false}},
		{"all are killed, a keeper keeps them for ever", func(s *poolSim, sock *pooled) {
			s.nodes[2].keeper = true
			s.kill(0)
			s.kill(1)
			for range 10_000 {
				s.nodes[2].look(1, 30, 0)
			}
		}, []bool{false, false, true}, []bool{false, false, true}},
		{"all are killed, a keeper keeps them for a while", func(s *poolSim, sock *pooled) {
			s.nodes[2].keeper = true
			s.kill(0)
			s.kill(1)
			for range 99 {
				s.nodes[2].look(1, 30, 100)
			}
			require.Len(s.t, s.nodes[2].sockets, 1)
			s.nodes[2].look(1, 30, 100)
		}, []bool{false, false, false}, []bool{false, false, false}},
		{"it is killed, and somebody may be there whom nobody hears", func(s *poolSim, sock *pooled) {
			s.kill(0)
			s.nodes[1].unheard = 1
			require.True(s.t, s.nodes[1].isOrphan(s.nodes[1].sockets[sock.id]), "its link has ended")
			s.nodes[1].sockets[sock.id].left = false
			require.False(s.t, s.nodes[1].isOrphan(s.nodes[1].sockets[sock.id]), "it may be that one's")
		}, []bool{false, true, true}, []bool{false, true, true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newPoolSim(t, 3)
			sock := s.listen(0, 80)
			s.nodes[1].on[at] = true
			s.tell(1, frame{kind: frameOn, at: at})
			s.deliverAll()
			s.bind(0, sock)
			s.deliverAll()
			for k := 1; k < 3; k++ {
				require.True(t, s.nodes[0].holdsAll(s.nodes[k].self, at))
			}
			c.do(s, sock)
			s.deliverAll()
			for k, n := range s.nodes {
				there := n.sockets[sock.id]
				require.Equal(t, c.hold[k], !n.dead && there != nil, "process %d", k)
				if !n.dead && there != nil {
					require.Equal(t, c.free[k], n.isFree(there), "process %d", k)
				}
			}
		})
	}
}

// Of two claims at once the one with the smaller id wins, in whatever order the messages
// come; an owner that is silent keeps what it owns.
func TestPoolClaims(t *testing.T) {
	for _, first := range []int{0, 1} {
		s := newPoolSim(t, 3)
		sock := s.listen(2, 80)
		s.deliverAll()
		s.bind(2, sock)
		s.deliverAll()
		claim := func(n, of int) bool { // asks one
			now, _ := s.nodes[of].hear(s.nodes[n].self, parcel{frame: frame{kind: frameClaim, n: 1, id: sock.id}})
			return now[0].flags&flagOK != 0
		}
		require.False(t, claim(0, 2), "the owner")
		s.nodes[1].peers[s.nodes[2].self].silent = true
		require.False(t, claim(0, 1), "somebody who knows of an owner, although it is silent")
		s.kill(2)
		for n := range 2 {
			s.nodes[n].sockets[sock.id].claimed = true
		}
		require.Equal(t, first == 0, claim(first, 1-first))
		require.Equal(t, first != 0, claim(1-first, first))
	}
}

// A process that has no room refuses a socket, says so, and wants it again later.
func TestPoolRefuses(t *testing.T) {
	s := newPoolSim(t, 2)
	room := false
	s.nodes[1].room = func() bool { return room }
	sock := s.listen(0, 80)
	s.deliverAll()
	require.Empty(t, s.nodes[1].sockets)
	require.True(t, s.nodes[1].refused)
	require.False(t, s.nodes[0].holdsAll(s.nodes[1].self, sock.at))
	room = true
	s.send(1, 0, frame{kind: frameTell})
	s.deliverAll()
	require.Len(t, s.nodes[1].sockets, 1)
	require.True(t, s.nodes[0].holdsAll(s.nodes[1].self, sock.at))
	// One that comes with its descriptor isn't taken either without room.
	room = false
	now, _ := s.nodes[1].hear(s.nodes[0].self, parcel{frame{kind: frameSocket, id: id{9}}, newDescriptor(-1)})
	require.Zero(t, now[0].flags&flagOK)
	require.Len(t, s.nodes[1].sockets, 1)
}

// FuzzPool: processes start, listen, leave, claim, are stopped and killed, and messages
// come late, in any order between different pairs; when all is said, all agree who owns
// what, whoever listens on an address holds all its sockets, and what nobody owns is
// served.
func FuzzPool(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})
	f.Add([]byte("listen, leave and die"))
	f.Add([]byte("011120070"))        // who listens lacks what a bystander was given
	f.Add([]byte("0022210021192000")) // and was given later
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		b := make([]byte, 200)
		for i := range b {
			b[i] = byte(r.IntN(256))
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		s := newPoolSim(t, 3)
		at := place{network: "tcp4", host: "127.0.0.1", port: 80}
		for i := 0; i+1 < len(ops) && len(s.nodes) < 12; i += 2 {
			n := int(ops[i+1]) % len(s.nodes)
			node := s.nodes[n]
			if node.dead {
				continue
			}
			switch ops[i] % 16 {
			case 0:
				if node.answers == 0 {
					s.bind(n, s.listen(n, 80))
				}
			case 1:
				if node.answers == 0 && node.on[at] {
					s.leave(n, at)
				}
			case 2:
				s.kill(n)
				s.start()
			case 3:
				node.stopped = !node.stopped
			case 4:
				for _, sock := range sorted(node.sockets) { // what claim does when all have said yes
					if node.on[at] && node.isOrphan(sock) && sock.bound {
						ok := true
						for k, other := range s.nodes {
							if k == n || other.dead || other.peers[node.self] == nil {
								continue
							}
							now, _ := other.hear(node.self, parcel{frame: frame{kind: frameClaim, n: 2, id: sock.id}})
							ok = ok && now[0].flags&flagOK != 0
						}
						if ok {
							sock.mine, sock.left = true, false
							s.tell(n, sock.frame(frameHas))
						}
						break
					}
				}
			case 5:
				node.keeper = !node.keeper
				fr := frame{kind: frameKeeper}
				if node.keeper {
					fr.flags = flagOK
				}
				s.tell(n, fr)
			default:
				s.deliver(n, int(ops[i])%len(s.nodes))
			}
		}
		for _, n := range s.nodes {
			n.stopped = false
		}
		s.check()
	})
}

func sorted(m map[id]*pooled) (all []*pooled) {
	for _, s := range m {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *pooled) int { return cmp.Compare(fmt.Sprint(a.id), fmt.Sprint(b.id)) })
	return all
}
