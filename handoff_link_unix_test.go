//go:build unix && !aix

package lblisten

// The links of a handoff, with an other end that stops, lies or floods.

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A rawPeer is the other end of a link, a frame at a time.
type rawPeer struct {
	t testing.TB
	*frameReader
	id id
}

func newRawPeer(t testing.TB, c net.Conn) *rawPeer {
	p := &rawPeer{t, &frameReader{c: c.(*net.UnixConn)}, newID()}
	t.Cleanup(func() {
		p.c.Close()
		p.drain()
	})
	return p
}

// dialProcess links to the one process that is in a directory.
func dialProcess(t testing.TB, path string) *rawPeer {
	t.Helper()
	ids, err := processesIn(path)
	require.NoError(t, err)
	require.Len(t, ids, 1)
	c, err := net.Dial("unix", filepath.Join(path, ids[0].String()))
	require.NoError(t, err)
	return newRawPeer(t, c)
}

func (p *rawPeer) send(f frame, d *descriptor) {
	if err := writeParcels(p.c, []parcel{{f, d}}); err != nil {
		p.t.Logf("send: %v", err) // the other end has closed
	}
}

func (p *rawPeer) hello(lowest, highest uint32, flags byte) {
	p.send(frame{kind: frameHello, flags: flags | flagOK, n: lowest<<16 | highest, id: p.id, at: place{network: helloName}}, nil)
}

// expect returns the next frame of a kind; others before it are none of its
// business.
func (p *rawPeer) expect(kind byte) parcel {
	p.t.Helper()
	p.c.SetReadDeadline(time.Now().Add(limit(5 * time.Second)))
	for {
		m, err := p.next()
		require.NoError(p.t, err)
		if m.kind == kind {
			return m
		}
		m.d.release()
	}
}

// isEnded waits until the other end has closed the link.
func (p *rawPeer) isEnded() {
	p.t.Helper()
	p.c.SetReadDeadline(time.Now().Add(limit(5 * time.Second)))
	for {
		m, err := p.next()
		m.d.release()
		if err != nil {
			require.NotErrorIs(p.t, err, os.ErrDeadlineExceeded)
			return
		}
	}
}

// obey answers as a process does that wants and has everything, until do says no.
func (p *rawPeer) obey(do func(m parcel) bool) {
	for {
		m, err := p.next()
		m.d.release()
		if err != nil || !do(m) {
			return
		}
		switch m.kind {
		case frameHello:
			p.hello(handoffLowest, handoffHighest, flagSettled)
		case frameSynced:
			p.send(frame{kind: frameSynced}, nil)
		case frameHas, frameOff, frameClaim, frameAsk:
			p.send(frame{kind: frameAnswer, flags: flagOK, n: m.n, id: m.id}, nil)
		}
	}
}

// fakeProcess is in a directory, and does what a test says with whoever dials it.
func fakeProcess(t testing.TB, path string, do func(p *rawPeer)) {
	self := newID()
	ln, err := announce(path, self)
	require.NoError(t, err)
	ended := make(chan struct{})
	var peers []*rawPeer
	go func() {
		defer close(ended)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p := &rawPeer{t, &frameReader{c: c.(*net.UnixConn)}, self}
			peers = append(peers, p)
			do(p)
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		os.Remove(filepath.Join(path, self.String()))
		<-ended
		for _, p := range peers {
			p.c.Close()
			p.drain()
		}
	})
}

// leftSocket is a balanced socket from which nobody accepts.
func leftSocket(t testing.TB) (left net.Listener, at place, d *descriptor) {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return onFD(c, joinsKernel) }}
	lc.SetMultipathTCP(false)
	left, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { left.Close() })
	at, _, err = resolved("tcp4", left.Addr().String())
	require.NoError(t, err)
	conn, err := left.(*net.TCPListener).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, onFD(conn, func(fd uintptr) (err error) { d, err = duplicate(fd); return err }))
	t.Cleanup(func() { d.release() })
	return left, at, d
}

// A process that stops at any step of the protocol delays Listen, Accept and Close of
// another by a second or so at most, and nothing is lost that it serves.
func TestHandoffPeerStopsAtEachStep(t *testing.T) {
	beside(t)
	for _, step := range []struct {
		name string
		kind byte
	}{{"hello", frameHello}, {"the list", frameSynced}, {"a deposit", frameHas}, {"an address", frameOn}, {"leaving", frameOff}} {
		t.Run(step.name, func(t *testing.T) {
			beside(t)
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				path := handoffPath(t)
				require.NoError(t, os.Mkdir(path, 0o700))
				fakeProcess(t, path, func(p *rawPeer) { p.obey(func(m parcel) bool { return m.kind != step.kind }) })
				opts := []Option{WithHandoff(path)}
				if dispatcher {
					opts = append(opts, WithDispatcher())
				}
				within := func(what string, times int, f func()) {
					t.Helper()
					begin := time.Now()
					f()
					require.Less(t, time.Since(begin), time.Duration(times)*exchangeTime+limit(500*time.Millisecond), what)
				}
				var g *Group
				within("Listen", 2, func() { // to join, and for the first socket
					var err error
					g, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opts...)
					require.NoError(t, err)
				})
				i := g.Info()
				require.Zero(t, i.OnKill&InheritHandoff)
				require.ErrorContains(t, i.Reason, "the handoff "+path)
				clients := queueUp(t, g.Addr(), 9)
				ls := g.Listeners()
				within("Accept and Close", 1, func() {
					require.NoError(t, ls[0].Close())
					require.NoError(t, ls[1].Close())
					for range clients {
						n := answer(t, acceptWithin(t, ls[2]))
						wantAnswer(t, clients[n], n)
					}
				})
				within("the last Close", 1, func() { require.NoError(t, ls[2].Close()) })
			})
		})
	}
}

// A process that stops when it is asked whether a newcomer may adopt a socket delays
// Listen by a second at most; the newcomer adopts it, or serves it beside its own.
func TestHandoffPeerStopsAtAClaim(t *testing.T) {
	beside(t)
	modes[0].need(t)
	path := handoffPath(t)
	require.NoError(t, os.Mkdir(path, 0o700))
	left, at, d := leftSocket(t)
	clients := queueUp(t, left.Addr(), 20)
	var claimed atomic.Bool
	fakeProcess(t, path, func(p *rawPeer) {
		has := frame{kind: frameHas, id: newID(), at: at, sub: at.network, flags: flagBalanced | flagBound | flagLeft}
		p.obey(func(m parcel) bool {
			switch m.kind {
			case frameSynced:
				p.send(has, nil)
			case frameWant:
				f := has
				f.kind = frameSocket
				p.send(f, d)
			case frameClaim:
				claimed.Store(true)
			}
			return m.kind != frameClaim
		})
	})
	begin := time.Now()
	ln, err := Listen("tcp4", at.String(), WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	require.Less(t, time.Since(begin), 2*exchangeTime+limit(500*time.Millisecond))
	require.True(t, claimed.Load())
	for range clients {
		n := answer(t, acceptWithin(t, ln))
		wantAnswer(t, clients[n], n)
	}
}

// Sockets that aren't what they are said to be are refused, the other is told so, and
// nothing else suffers.
func TestHandoffWrongSockets(t *testing.T) {
	beside(t)
	modes[0].need(t)
	plain, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer plain.Close()
	_, _, other := leftSocket(t)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	path := handoffPath(t)
	file, err := os.Create(filepath.Join(filepath.Dir(path), "file"))
	require.NoError(t, err)
	defer file.Close()
	unbound, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	descriptors := []*descriptor{other, newDescriptor(unbound)}
	for _, s := range []syscall.Conn{plain.(*net.TCPListener), udp.(*net.UDPConn), file} {
		conn, err := s.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, onFD(conn, func(fd uintptr) error {
			d, err := duplicate(fd)
			descriptors = append(descriptors, d)
			return err
		}))
	}
	defer func() {
		for _, d := range descriptors[1:] {
			d.release()
		}
	}()
	ln, err := Listen("tcp4", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	at, _, err := resolved("tcp4", ln.Addr().String())
	require.NoError(t, err)
	p := dialProcess(t, path)
	p.hello(handoffLowest, handoffHighest, flagSettled)
	p.expect(frameSynced)
	p.send(frame{kind: frameSynced}, nil)
	for _, sub := range []string{"tcp4", "tcp6", "x"} {
		for _, d := range descriptors {
			has := frame{kind: frameHas, id: newID(), at: at, sub: sub, flags: flagBalanced | flagBound | flagLeft}
			p.send(has, nil)
			require.Equal(t, has.id, p.expect(frameWant).id)
			has.kind = frameSocket
			p.send(has, d)
			for m := p.expect(frameAnswer); ; m = p.expect(frameAnswer) {
				if require.Equal(t, has.id, m.id); m.flags&flagOK == 0 {
					break // at first it has it, then it has looked
				}
			}
		}
	}
	require.Equal(t, 1, ln.(*Listener).Info().Sockets)
	c := dialTest(t, ln.Addr())
	acceptWithin(t, ln)
	c.Close()
	p.c.Close()
	require.NoError(t, ln.Close())
}

// What a process does with a peer that speaks nonsense: it ends the link, and nothing
// else.
func TestHandoffBadPeer(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	hello := (&frame{kind: frameHello, n: 1<<16 | handoffHighest, id: newID(), at: place{network: helloName}}).append(nil)
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	rights := func(n int) []byte {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		return unix.UnixRights(fds...)
	}
	socket := (&frame{kind: frameSocket, n: 1, id: newID()}).append(nil)
	has := (&frame{kind: frameHas, n: 1, id: newID()}).append(nil)
	b := startServer(t, serverJob{Path: path, Address: ln.Addr().String()})
	b.close() // from here on there are its sockets to adopt
	for _, c := range []struct {
		name   string
		bytes  []byte
		rights []byte
		ends   bool // at once
	}{
		{"nothing", nil, nil, true}, // within exchangeTime
		{"garbage", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), nil, true},
		{"zeroes", make([]byte, 4096), nil, true},
		{"half a message", hello[:20], nil, true},
		{"no hello first", socket, rights(1), true},
		{"a descriptor that isn't there", append(append([]byte{}, hello...), socket...), nil, true},
		{"a descriptor that nobody asked for", append(append([]byte{}, hello...), socket...), rights(1), false},
		{"a socket that doesn't come", append(append([]byte{}, hello...), has...), nil, false},
		{"a descriptor without a message", hello, rights(3), false},
		{"too many descriptors", hello, rights(messageDescriptors + 1), false},
		{"very many descriptors", hello, rights(250), false},
		{"an observer that talks", (&frame{kind: frameHello, flags: flagObserver, n: 1<<16 | 1, id: newID(), at: place{network: helloName}}).append((&frame{kind: frameHello, flags: flagObserver, n: 1<<16 | 1, id: newID(), at: place{network: helloName}}).append(nil)), nil, true},
		{"every kind of frame", func() []byte {
			b := append([]byte{}, hello...)
			for kind := range byte(64) {
				if kind != frameSocket {
					b = (&frame{kind: kind, id: newID(), n: 1 << 31, at: place{network: "tcp", host: "::", port: 65535}}).append(b)
				}
			}
			return b
		}(), nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := openDescriptors()
			u := dialProcess(t, path).c
			defer u.Close()
			if c.bytes != nil {
				_, _, err = u.WriteMsgUnix(c.bytes, c.rights, nil)
				require.NoError(t, err)
			}
			u.SetReadDeadline(time.Now().Add(exchangeTime + limit(2*time.Second)))
			if c.ends {
				_, err = io.Copy(io.Discard, u)
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
			}
			u.Close()
			require.Eventually(t, func() bool { return openDescriptors() <= before }, limit(5*time.Second), time.Millisecond, "descriptors are left over")
			b := startServer(t, serverJob{Path: path, Address: ln.Addr().String()})
			soon(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff != 0 }, "the process is of no use any more")
			b.close()
		})
	}
}

// A peer that doesn't answer is silent: asked once, for a second, and not waited for
// again; and one that doesn't read is dropped when its queue is full.
func TestHandoffPeerThatStopsReading(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	at, _, err := resolved("tcp", ln.Addr().String())
	require.NoError(t, err)
	p := dialProcess(t, path)
	p.hello(handoffLowest, handoffHighest, flagSettled)
	p.expect(frameHello)
	p.send(frame{kind: frameOn, at: at}, nil)
	p.send(frame{kind: frameSynced}, nil)
	has := p.expect(frameHas)
	p.send(frame{kind: frameAnswer, flags: flagOK, id: has.id}, nil)
	is := func(want bool) {
		t.Helper()
		require.Eventually(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff != 0 == want }, limit(5*time.Second), time.Millisecond)
	}
	is(true)
	for i, most := range []time.Duration{exchangeTime + limit(500*time.Millisecond), exchangeTime / 2} {
		begin := time.Now()
		more, err := Listen("tcp", ln.Addr().String(), WithHandoff(path)) // it doesn't confirm the socket
		require.NoError(t, err)
		require.Less(t, time.Since(begin), most, "%d", i)
		is(false)
		require.ErrorContains(t, ln.(*Listener).Info().Reason, "doesn't answer; is it stopped?")
		require.NoError(t, more.Close())
	}
	p.send(frame{kind: frameAsk, n: 1}, nil) // it goes on
	handoffs.mu.Lock()
	h := handoffs.m[path]
	handoffs.mu.Unlock()
	for range 2 * queuedFrames {
		h.mu.Lock()
		h.tellLocked(frame{kind: frameAsk, n: 1 << 30})
		links := len(h.links)
		h.mu.Unlock()
		if links == 0 {
			break
		}
	}
	soon(t, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.links) == 0
	}, "the link of a peer that doesn't read is there still")
}

// A peer that sends sockets without end doesn't use up the descriptors of another
// process: the last quarter is for its own.
func TestHandoffPeerThatFloods(t *testing.T) {
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "flooded", "LBLISTEN_TEST_PATH="+handoffPath(t)))
}

func floodedWorker() {
	path := os.Getenv("LBLISTEN_TEST_PATH")
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	must(err)
	ids, err := processesIn(path)
	must(err)
	c, err := net.Dial("unix", filepath.Join(path, ids[0].String()))
	must(err)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	must(err)
	d := newDescriptor(fd)
	must(setFileLimit(128))
	p := &rawPeer{nil, &frameReader{c: c.(*net.UnixConn)}, newID()}
	p.hello(1, 1, flagSettled)
	kept := 0
	for n := range uint32(200) {
		f := frame{kind: frameHas, n: n + 1, id: newID(), at: place{network: "tcp", host: "::", port: 1}, flags: flagMine}
		must(writeParcels(p.c, []parcel{{frame: f}}))
		for answered := false; !answered; {
			m, err := p.next()
			must(err)
			m.d.release()
			switch {
			case m.kind == frameWant && m.id == f.id:
				f.kind = frameSocket
				must(writeParcels(p.c, []parcel{{f, d}}))
			case m.kind == frameAnswer && m.id == f.id:
				answered = true
				if m.flags&flagOK != 0 {
					kept++
				}
			}
		}
	}
	if kept > 96 || kept < 48 {
		panic(fmt.Sprintf("the process keeps %d sockets", kept))
	}
	for range 8 { // two descriptors each
		_, err := net.Dial("tcp", ln.Addr().String())
		must(err)
		_, err = ln.Accept()
		must(err)
	}
	fmt.Println("ok")
}

// Processes agree on a version that both speak, and say so if there is none.
func TestHandoffVersions(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	for _, c := range []struct {
		lowest, highest uint32
		common          bool
	}{{1, 1, true}, {1, 2, true}, {0, 1, true}, {2, 3, false}, {0, 0, false}} {
		p := dialProcess(t, path)
		p.hello(c.lowest, c.highest, flagSettled)
		require.EqualValues(t, 1<<16|1, p.expect(frameHello).n, "%+v", c)
		if c.common {
			p.expect(frameSynced)
		} else {
			p.isEnded()
		}
		p.c.Close()
	}
	require.NoError(t, ln.Close())
	fakeProcess(t, path, func(p *rawPeer) {
		p.expect(frameHello)
		p.hello(2, 3, flagSettled)
	})
	ln, err = Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	require.ErrorContains(t, ln.(*Listener).Info().Reason, "speaks other versions of the protocol, 2 to 3, this one 1 to 1")
	require.NoError(t, ln.Close())
}

// Of two links of one pair the one stays that the process with the smaller id has dialled,
// and a process that dials although it has a link has lost that one.
func TestHandoffOneLinkAPair(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	handoffs.mu.Lock()
	h := handoffs.m[path]
	handoffs.mu.Unlock()
	for _, smaller := range []bool{true, false} {
		p := dialProcess(t, path)
		p.id = id{0xff, 0xff}
		if smaller {
			p.id = id{0, 1}
		}
		h.mu.Lock()
		h.dialing[p.id] = &link{h: h, peer: p.id, dialed: true} // it is being dialled
		h.mu.Unlock()
		p.hello(1, 1, flagSettled)
		if smaller {
			p.expect(frameSynced)
		} else {
			p.isEnded()
		}
		h.mu.Lock()
		require.Equal(t, smaller, h.dialing[p.id] == nil)
		delete(h.dialing, p.id)
		h.mu.Unlock()
		if smaller {
			again := dialProcess(t, path)
			again.id = p.id
			again.hello(1, 1, flagSettled)
			again.expect(frameSynced)
			p.isEnded()
			again.c.Close()
		}
	}
}
