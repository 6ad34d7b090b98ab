//go:build unix && !aix

package lblisten

// Who holds which sockets, and for how long.

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Several addresses, of several networks, use one path.
func TestHandoffSeveralAddresses(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	type addr struct{ network, address string }
	var addrs []addr
	var mine []*Listener
	for _, e := range endpoints[:3] {
		e.need(t)
		addrs = append(addrs, addr{e.network, e.listen})
	}
	addrs = append(addrs, addr{"unix", filepath.Join(filepath.Dir(path), "app.sock")})
	var jobs []serverJob
	for _, a := range addrs {
		_, ls := newTestGroup(t, 1, a.network, a.address, WithHandoff(path))
		mine = append(mine, ls[0])
		jobs = append(jobs, serverJob{Path: path, Network: a.network, Address: ls[0].Addr().String(), Members: 1})
	}
	for i, job := range jobs {
		s := startServer(t, job)
		s.becomes(isHandedOff)
		require.NotZero(t, mine[i].Info().OnKill&InheritHandoff)
		for range 2 {
			c := dialTest(t, mine[i].Addr())
			_, err := c.Write([]byte("x"))
			require.NoError(t, err)
			defer c.Close()
		}
		s.kill()
	}
	for i := range jobs {
		for range 2 {
			acceptWithin(t, mine[i])
		}
	}
	for _, l := range mine {
		require.NoError(t, l.Close())
	}
	require.NoFileExists(t, addrs[3].address)
}

// What is kept for an address that nobody listens on is kept for unservedFor.
func TestHandoffUnserved(t *testing.T) {
	noLeaks(t)
	defer set(&unservedFor, 100*time.Millisecond)()
	defer set(&beatEvery, 50*time.Millisecond)()
	path := handoffPath(t)
	elsewhere, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer elsewhere.Close()
	one := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0"})
	pool := func() (n int) {
		eachPooled(path, func(int) { n++ })
		return n
	}
	require.Equal(t, 1+4, pool())
	conns := standing(t, one.Address, 8)
	one.kill()
	require.Eventually(t, func() bool { return pool() == 1 }, limit(5*time.Second), 5*time.Millisecond)
	require.Zero(t, answered(conns))
}

// What is kept for an address without a process is let go in time, although the
// hub has changed since.
func TestHandoffUnservedAfterHubChange(t *testing.T) {
	noLeaks(t)
	defer set(&unservedFor, 200*time.Millisecond)()
	defer set(&beatEvery, 50*time.Millisecond)()
	path := handoffPath(t)
	hub := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 1})
	mine, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer mine.Close()
	last := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 2})
	last.kill()
	hub.kill()
	require.Eventually(t, func() bool {
		c, err := dialOnce("tcp", last.Address)
		if err == nil {
			c.Close()
		}
		return isHub(path) && isRefused(err)
	}, limit(10*time.Second), 10*time.Millisecond)
}

// Past 256 sockets of a process the others take no more. Info says so, and
// nothing else suffers.
func TestHandoffTakesSoManySockets(t *testing.T) {
	noLeaks(t)
	defer set(&handoffMost, 6)()
	path := handoffPath(t)
	_, ls := newTestGroup(t, 4, "tcp4", "127.0.0.1:0", WithHandoff(path))
	b := startServer(t, serverJob{Path: path, Address: ls[0].Addr().String(), Members: 1})
	for range 3 {
		begin := time.Now()
		_, more := newTestGroup(t, 4, "tcp4", "127.0.0.1:0", WithHandoff(path))
		require.Less(t, time.Since(begin), exchangeTime)
		require.NotZero(t, ls[0].Info().OnKill&InheritHandoff)
		c := startServer(t, serverJob{Path: path, Address: more[0].Addr().String(), Members: 1})
		require.ErrorContains(t, more[0].Info().Reason, "don't have every socket")
		c.close()
		for _, l := range more {
			l.Close()
		}
	}
	b.close()
}

// A hub that doesn't get a socket from the first process that has it asks the
// next.
func TestHandoffHubAsksTheNext(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	h, err := startHub(path, newID())
	require.NoError(t, err)
	defer h.close()
	id := newID()
	silent, other := dialHub(t, path), dialHub(t, path)
	silent.hello(1, 1)
	silent.expect(frameHello)
	silent.send(frame{kind: frameHas, id: id}, nil)
	silent.expect(frameWant)
	other.hello(1, 1)
	other.expect(frameHello)
	other.send(frame{kind: frameHas, id: id, flags: flagMine | flagBalanced}, nil)
	other.send(frame{kind: frameSynced}, nil)
	other.expect(frameWant)
	other.expect(frameSynced)
}

// Who was killed doesn't count as one who accepts, also if the hub has not read
// its last words yet.
func TestHandoffHubLooksWhoLives(t *testing.T) {
	noLeaks(t)
	ln, err := net.Listen("unix", handoffPath(t))
	require.NoError(t, err)
	defer ln.Close()
	h := &hub{peers: make(map[*hubPeer]bool)}
	at := place{network: "unix", host: "/app.sock"}
	join := func() (*hubPeer, net.Conn) {
		c, err := net.Dial("unix", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		p := &hubPeer{w: newRawPeer(t, acceptWithin(t, ln)).wire, on: map[place]bool{at: true}}
		h.peers[p] = true
		return p, c
	}
	one, _ := join()
	_, other := join()
	require.EqualValues(t, flagOK, h.offLocked(one, at))
	_, err = other.Write([]byte("last words"))
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.Zero(t, h.offLocked(one, at))
}

// A new hub doesn't wait for processes that have come and gone.
func TestHandoffHubWaitsForNobodyTwice(t *testing.T) {
	h := &hub{young: true, expected: 2, peers: make(map[*hubPeer]bool), count: make(chan int, 1)}
	var came []*hubPeer
	for range h.expected {
		require.False(t, h.completeLocked())
		p := &hubPeer{asked: true, synced: true}
		h.peers[p] = true
		came = append(came, p)
	}
	for _, p := range came {
		require.True(t, h.completeLocked())
		h.leaveLocked(p)
	}
	require.True(t, h.completeLocked())
}
