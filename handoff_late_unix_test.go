//go:build unix && !aix

package lblisten

// What comes too late in a handoff: processes that close, stop or answer while others join.

import (
	"context"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func handoffOf(path string) *handoff {
	handoffs.mu.Lock()
	defer handoffs.mu.Unlock()
	return handoffs.m[path]
}

func (h *handoff) hasLink() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.links) > 0
}

// A process closes while another one that joins still asks for its sockets: if that listens
// in time it gets them all, and nothing is lost.
func TestHandoffClosesWhileAnotherJoins(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root: TestUnprivileged runs it as another user")
	}
	tried, taken, lost := 0, 0, 0
	for range races(count(40, 6), 10) {
		path := handoffPath(t)
		g, err := ListenGroup(context.Background(), "tcp4", "127.0.0.1:0", 64, WithHandoff(path))
		require.NoError(t, err)
		h := handoffOf(path)
		var conns []net.Conn
		for range 64 {
			conns = append(conns, dialTest(t, g.Addr()))
		}
		s := beginServer(t, serverJob{Path: path, Network: "tcp4", Address: g.Addr().String(), Members: 1, Accept: true})
		soon(t, h.hasLink)
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Microsecond)
		on := func() bool { // it is there, so it takes over
			h.mu.Lock()
			defer h.mu.Unlock()
			for _, p := range h.pool.peers {
				if p.on[g.a.at] {
					return true
				}
			}
			return false
		}()
		require.NoError(t, g.Close())
		s.hear()
		require.Empty(t, s.Err)
		if on {
			taken++
			tried += len(conns)
			for _, c := range conns {
				c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
				c.Write([]byte("x"))
			}
			lost += len(conns) - answered(conns)
		}
		for _, c := range conns {
			c.Close()
		}
		s.end()
	}
	t.Logf("%d times: %d tried, %d lost", taken, tried, lost)
	require.Zero(t, lost)
}

// A process closes beside others of which each serves its own sockets: it waits for none
// of them, since there is nothing more to hand over.
func TestHandoffClosesBesideOthers(t *testing.T) {
	beside(t)
	for range 3 {
		path := handoffPath(t)
		g, err := ListenGroup(context.Background(), "tcp4", "127.0.0.1:0", 2, WithHandoff(path))
		require.NoError(t, err)
		var others [2]*server
		for i := range others {
			others[i] = startServer(t, serverJob{Path: path, Network: "tcp4", Address: g.Addr().String(), Members: 2, Accept: true})
		}
		for _, ln := range g.Listeners() {
			soon(t, func() bool { return ln.Info().OnKill&InheritHandoff != 0 })
		}
		begin := time.Now()
		require.NoError(t, g.Close())
		took := time.Since(begin)
		for _, s := range others {
			s.end()
		}
		if took < exchangeTime/2 {
			return
		}
	}
	t.Fatal("closing waited for others each time")
}

// One keeper goes while another comes: it waits until that has everything.
func TestKeepersTakeOver(t *testing.T) {
	beside(t)
	for range count(12, 2) {
		dir := filepath.Dir(handoffPath(t))
		require.NoError(t, os.Mkdir(dir+"/a", 0o700))
		require.NoError(t, os.Symlink(dir+"/a", dir+"/b")) // two handoffs of one process
		paths := []string{dir + "/a/h", dir + "/b/h"}
		var stop [2]context.CancelFunc
		var kept [2]chan error
		keepIt := func(i int) {
			ctx, cancel := context.WithCancel(context.Background())
			stop[i], kept[i] = cancel, make(chan error, 1)
			go func() { kept[i] <- keep(ctx, paths[i], 0, nil) }()
			soon(t, func() bool { return handoffOf(paths[i]) != nil })
		}
		sockets := func(i int) int {
			h := handoffOf(paths[i])
			h.mu.Lock()
			defer h.mu.Unlock()
			return len(h.pool.sockets)
		}
		keepIt(0)
		s := startServer(t, serverJob{Path: paths[0], Network: "tcp4", Address: "127.0.0.1:0", Members: 64})
		soon(t, func() bool { return sockets(0) == 64 })
		s.kill()
		soon(t, func() bool { return !handoffOf(paths[0]).hasLink() })
		keepIt(1)
		soon(t, handoffOf(paths[0]).hasLink)
		stop[0]()
		require.NoError(t, <-kept[0])
		soon(t, func() bool { return sockets(1) == 64 }, "the second keeper doesn't have all")
		stop[1]()
		require.NoError(t, <-kept[1])
	}
}

// A string as long as a frame can have.
func TestHandoffLongestString(t *testing.T) {
	f := frame{kind: frameOn, id: newID(), at: place{network: "unix", host: strings.Repeat("x", 255)}}
	got, _, err := decodeFrame(f.append(nil))
	require.NoError(t, err)
	require.Equal(t, f, got)
}

// A process that never says hello holds nobody's file.
func TestHandoffFileBesideASilentProcess(t *testing.T) {
	beside(t)
	path := handoffPath(t)
	require.NoError(t, os.Mkdir(path, 0o700))
	fakeProcess(t, path, func(p *rawPeer) {})
	sock := filepath.Join(filepath.Dir(path), "s")
	for range 2 {
		ln, err := Listen("unix", sock, WithHandoff(path))
		require.NoError(t, err)
		require.NoError(t, ln.Close())
		require.NoFileExists(t, sock)
	}
}

// An owner stops before it has told that its socket listens, or before it has sent a socket
// that a keeper has too: what is queued there is served nevertheless.
func TestHandoffOwnerStopsAtAnInstant(t *testing.T) {
	beside(t)
	for _, sends := range []bool{true, false} {
		path := handoffPath(t)
		require.NoError(t, os.Mkdir(path, 0o700))
		left, at, d := leftSocket(t)
		queueUp(t, left.Addr(), 5)
		has := frame{kind: frameHas, id: newID(), at: at, sub: at.network, flags: flagBalanced}
		fakeProcess(t, path, func(p *rawPeer) { // the owner
			p.obey(func(m parcel) bool {
				f := has
				f.flags |= flagMine
				switch m.kind {
				case frameSynced:
					p.send(frame{kind: frameOn, at: at}, nil)
					p.send(f, nil)
					return sends
				case frameWant:
					f.kind = frameSocket
					p.send(f, d)
					return false
				}
				return true
			})
		})
		if !sends {
			fakeProcess(t, path, func(p *rawPeer) { // the keeper
				go p.obey(func(m parcel) bool {
					f := has
					f.flags |= flagBound
					switch m.kind {
					case frameSynced:
						p.send(frame{kind: frameKeeper, flags: flagOK}, nil)
					case frameTell:
						p.send(f, nil)
						p.send(frame{kind: frameSynced}, nil)
					case frameWant:
						f.kind = frameSocket
						p.send(f, d)
					}
					return true
				})
			})
		}
		ln, err := Listen("tcp4", at.String(), WithHandoff(path))
		require.NoError(t, err)
		c, err := acceptBy(ln, limit(8*time.Second))
		require.NoError(t, err, "sends: %v", sends)
		c.Close()
		require.NoError(t, ln.Close())
	}
}

// Whoever ends each link at once, or says nonsense, is dialled once a look, not without end.
func TestHandoffDialsNobodyWithoutEnd(t *testing.T) {
	beside(t)
	for _, closes := range []bool{true, false} {
		path := handoffPath(t)
		require.NoError(t, os.Mkdir(path, 0o700))
		var dials atomic.Int64
		fakeProcess(t, path, func(p *rawPeer) {
			dials.Add(1)
			if closes {
				p.c.Close()
				return
			}
			p.hello(handoffLowest, handoffHighest, flagSettled)
			p.send(frame{kind: frameSocket}, nil)
		})
		ln, err := Listen("tcp4", "127.0.0.1:0", WithHandoff(path))
		require.NoError(t, err)
		time.Sleep(2 * lookEvery)
		require.NoError(t, ln.Close())
		require.LessOrEqual(t, dials.Load(), int64(8))
	}
}

// A process that announces itself anew while it ends leaves no file.
func TestHandoffAnnouncesItselfAtTheEnd(t *testing.T) {
	for range count(100, 20) {
		h := newHandoff(handoffPath(t), nil)
		h.refs = 1
		require.NoError(t, h.join())
		require.NoError(t, os.Remove(h.name()))
		h.wg.Add(1)
		go func() {
			defer h.wg.Done()
			h.lookAtDirectory()
		}()
		h.close()
		require.NoFileExists(t, h.name())
	}
}
