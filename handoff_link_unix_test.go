//go:build unix && !aix

package lblisten

// The protocol of the handoff, with an other end that stops, lies or floods.

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// rawPeer speaks with a hub, or as one, a frame at a time.
type rawPeer struct {
	t testing.TB
	*wire
}

func newRawPeer(t testing.TB, c net.Conn) rawPeer {
	w := newWire(c.(*net.UnixConn))
	t.Cleanup(func() {
		w.close()
		w.drain()
	})
	return rawPeer{t, w}
}

func dialHub(t testing.TB, path string) rawPeer {
	t.Helper()
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	return newRawPeer(t, c)
}

// expect returns the next frame of a kind; others before it are none of its
// business.
func (p rawPeer) expect(kind byte) (frame, *descriptor) {
	p.t.Helper()
	for {
		f, d, err := p.read(limit(5 * time.Second))
		require.NoError(p.t, err)
		if f.kind == kind {
			return f, d
		}
		if d != nil {
			d.release()
		}
	}
}

// ended waits until the other end has closed the connection.
func (p rawPeer) isEnded() {
	p.t.Helper()
	for {
		_, d, err := p.read(limit(5 * time.Second))
		if d != nil {
			d.release()
		}
		if err != nil {
			require.NotErrorIs(p.t, err, os.ErrDeadlineExceeded)
			return
		}
	}
}

func (p rawPeer) hello(lowest, highest uint32) {
	p.send(frame{kind: frameHello, n: lowest<<16 | highest, process: newID(), at: place{network: helloName}}, nil)
}

// fakeHub holds the lock of a path and listens there, and does what a test says
// with the one process that comes.
func fakeHub(t testing.TB, path string, do func(p rawPeer)) {
	lock, err := openLock(path)
	require.NoError(t, err)
	conn, err := lock.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, onFD(conn, func(fd uintptr) error { return unix.Flock(int(fd), unix.LOCK_EX) }))
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	ended := make(chan struct{})
	var peers []*wire
	go func() {
		defer close(ended)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p := rawPeer{t, newWire(c.(*net.UnixConn))}
			peers = append(peers, p.wire)
			do(p)
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-ended
		for _, w := range peers {
			w.close()
			w.drain()
		}
		lock.Close()
	})
}

// leftSocket is a balanced socket from which nobody accepts, and what sends it as
// a hub does.
func leftSocket(t testing.TB) (left net.Listener, at place, send func(p rawPeer)) {
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
	return left, at, func(p rawPeer) {
		must(onFD(conn, func(fd uintptr) error {
			d, err := duplicate(fd)
			if err == nil {
				p.send(frame{kind: frameSocket, id: newID(), at: at, sub: at.network, flags: flagBalanced}, d)
				d.release()
			}
			return err
		}))
	}
}

// A hub that stops at any step of the protocol delays Listen, Accept and Close by
// a second or so at most, and nothing is lost that they serve.
func TestHandoffHubStopsAtEachStep(t *testing.T) {
	beside(t)
	// answering lets a hub answer until it hears a frame of a kind, and then no more.
	answering := func(until byte) func(p rawPeer) {
		return func(p rawPeer) {
			for {
				f, d, err := p.read(limit(30 * time.Second))
				if d != nil {
					d.release()
				}
				if err != nil || f.kind == until {
					return
				}
				switch f.kind {
				case frameHello:
					p.send(frame{kind: frameHello, n: handoffHighest}, nil)
				case frameSynced:
					p.send(frame{kind: frameSynced}, nil)
				case frameSocket, frameOn, frameOwner, frameOff:
					p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
				}
			}
		}
	}
	for _, step := range []struct {
		name string
		kind byte
	}{{"hello", frameHello}, {"the list", frameSynced}, {"a deposit", frameSocket}, {"an address", frameOn}, {"leaving", frameOff}} {
		t.Run(step.name, func(t *testing.T) {
			beside(t)
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				path := handoffPath(t)
				fakeHub(t, path, answering(step.kind))
				opts := []Option{WithHandoff(path)}
				if dispatcher {
					opts = append(opts, WithDispatcher())
				}
				within := func(what string, f func()) {
					t.Helper()
					begin := time.Now()
					f()
					require.Less(t, time.Since(begin), exchangeTime+limit(500*time.Millisecond), what)
				}
				var g *Group
				within("Listen", func() {
					var err error
					g, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opts...)
					require.NoError(t, err)
				})
				i := g.Info()
				require.Zero(t, i.OnKill&InheritHandoff)
				require.ErrorContains(t, i.Reason, "the handoff "+path)
				clients := queueUp(t, g.Addr(), 9)
				ls := g.Listeners()
				within("Accept and Close", func() {
					require.NoError(t, ls[0].Close())
					require.NoError(t, ls[1].Close())
					for range clients {
						n := answer(t, acceptWithin(t, ls[2]))
						wantAnswer(t, clients[n], n)
					}
				})
				within("the last Close", func() { require.NoError(t, ls[2].Close()) })
			})
		})
	}
}

// A hub that is stopped in the middle of a newcomer's joining delays its Listen
// by a second or two at most; nothing is lost, and when the hub goes on, all
// agree again.
func TestHandoffHubStopsWhileSomebodyJoins(t *testing.T) {
	beside(t)
	type joined struct {
		g    *Group
		err  error
		took time.Duration
	}
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		delays := []time.Duration{0, 300 * time.Microsecond, 600 * time.Microsecond, time.Millisecond, 1500 * time.Microsecond, 3 * time.Millisecond}
		sets := make([][3]*server, count(len(delays), 2))
		joins := make([]chan joined, len(sets))
		var conns []net.Conn
		for i := range sets {
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher}
			for k := range sets[i] {
				sets[i][k] = startServer(t, job)
				job.Address = sets[i][0].Address
			}
			for _, s := range sets[i] {
				s.becomes(isHandedOff)
			}
			require.True(t, sets[i][0].Hub)
			conns = append(conns, standing(t, job.Address, count(60, 10))...)
			sets[i][1].kill() // it leaves two sockets to adopt
			opts := []Option{WithHandoff(job.Path)}
			if dispatcher {
				opts = append(opts, WithDispatcher())
			}
			joins[i] = make(chan joined, 1)
			go func() {
				begin := time.Now()
				g, err := ListenGroup(context.Background(), "tcp", job.Address, 2, opts...)
				joins[i] <- joined{g, err, time.Since(begin)}
			}()
			time.Sleep(delays[i])
			sets[i][0].signal(syscall.SIGSTOP)
		}
		var wg sync.WaitGroup
		var accepted atomic.Int64
		var took time.Duration
		var groups []*Group
		for i := range sets {
			j := <-joins[i]
			took = max(took, j.took)
			sets[i][2].ask("accept")
			if j.err != nil { // nobody could give it the one socket there is
				require.True(t, dispatcher)
				require.ErrorContains(t, j.err, "the handoff ")
				continue
			}
			groups = append(groups, j.g)
			for _, l := range j.g.Listeners() {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
		}
		served := answered(conns)
		t.Logf("%d times, of which it listened %d times; Listen took %v at most; %d tried, %d lost", len(sets), len(groups), took.Round(time.Millisecond), len(conns), len(conns)-served)
		for _, c := range conns {
			c.Close()
		}
		for _, s := range sets {
			s[0].signal(syscall.SIGCONT)
		}
		for _, s := range sets {
			s[0].becomes(isHandedOff)
			s[2].becomes(isHandedOff)
		}
		for _, g := range groups {
			require.Eventually(t, func() bool { return g.Info().OnKill&InheritHandoff != 0 }, limit(10*time.Second), 10*time.Millisecond, "%+v", g.Info())
			require.NoError(t, g.Close())
		}
		wg.Wait()
		require.Less(t, took, limit(4*time.Second))
		require.Equal(t, len(conns), served)
	})
}

// A hub that stops when it is asked for a socket that a newcomer wants to adopt
// delays Listen by a second at most; the newcomer opens a socket of its own, and
// serves the other too while nobody is known to.
func TestHandoffHubStopsAtAClaim(t *testing.T) {
	beside(t)
	modes[0].need(t)
	path := handoffPath(t)
	left, at, sendLeft := leftSocket(t)
	clients := queueUp(t, left.Addr(), 20)
	claimed := make(chan struct{})
	fakeHub(t, path, func(p rawPeer) {
		told := false
		for {
			f, d, err := p.read(limit(30 * time.Second))
			if d != nil {
				d.release()
			}
			if err != nil {
				return
			}
			switch f.kind {
			case frameHello:
				p.send(frame{kind: frameHello, n: handoffHighest}, nil)
			case frameSynced:
				p.send(frame{kind: frameSynced}, nil)
			case frameOn:
				if !told {
					told = true
					sendLeft(p)
				}
				p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
			case frameOwner:
				close(claimed)
				return // and no more
			}
		}
	})
	begin := time.Now()
	ln, err := Listen("tcp4", at.String(), WithHandoff(path))
	require.NoError(t, err)
	require.Less(t, time.Since(begin), 2*exchangeTime+limit(time.Second))
	<-claimed
	clients = append(clients, queueUp(t, left.Addr(), 20)...)
	for range clients {
		c := acceptWithin(t, ln)
		c.Close()
	}
	t.Logf("%d tried, 0 lost", len(clients))
	require.NoError(t, ln.Close())
}

// What a hub sends is shared when it has told everything, or goes: before that it
// holds it, and this process may be short of descriptors.
func TestHandoffHubTellsHalf(t *testing.T) {
	beside(t)
	modes[0].need(t)
	path := handoffPath(t)
	left, at, sendLeft := leftSocket(t)
	clients := queueUp(t, left.Addr(), 20)
	told, goes := make(chan struct{}), make(chan struct{})
	leave := sync.OnceFunc(func() { close(goes) })
	defer leave()
	sessions := 0
	fakeHub(t, path, func(p rawPeer) {
		defer p.c.Close()
		if sessions++; sessions > 2 {
			return
		}
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: handoffHighest}, nil)
		p.expect(frameSynced)
		if sessions == 2 { // the first one made it serve everything
			sendLeft(p)
			close(told)
			<-goes
		}
	})
	ln, err := Listen("tcp4", at.String(), WithHandoff(path))
	require.NoError(t, err)
	<-told
	time.Sleep(limit(100 * time.Millisecond))
	require.Equal(t, 1, ln.(*Listener).Info().Sockets)
	leave()
	require.Eventually(t, func() bool { return ln.(*Listener).Info().Sockets == 2 }, limit(5*time.Second), time.Millisecond)
	left.Close() // whoever else held it has died
	handoffs.mu.Lock()
	h := handoffs.m[path]
	handoffs.mu.Unlock()
	h.fail(unix.EMFILE) // no descriptor for a hub
	h.settle()
	for range clients {
		c := acceptWithin(t, ln)
		c.Close()
	}
	require.Equal(t, 2, ln.(*Listener).Info().Sockets)
	require.NoError(t, ln.Close())
}

// What a process does with the hub of an attacker, or of a bug: it takes no
// descriptor that isn't what it is said to be, and goes on.
func TestHandoffBadHub(t *testing.T) {
	beside(t)
	plain, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer plain.Close()
	other, err := Listen("tcp4", "127.0.0.1:0", WithRequireKernel())
	if err != nil {
		t.Skipf("the kernel doesn't balance here: %v", err)
	}
	defer other.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	path := handoffPath(t)
	file, err := os.Create(filepath.Join(filepath.Dir(path), "file"))
	require.NoError(t, err)
	defer file.Close()
	unbound, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(unbound)

	sent, done := make(chan struct{}), false
	fakeHub(t, path, func(p rawPeer) {
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: handoffHighest}, nil)
		p.expect(frameSynced)
		p.send(frame{kind: frameSynced}, nil)
		f, d, err := p.read(limit(5 * time.Second))
		for err == nil {
			if d != nil {
				d.release()
			}
			if f.kind == frameSocket || f.kind == frameOn {
				p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
			}
			if f.kind == frameOn && !done {
				done = true
				for _, s := range []syscall.Conn{plain.(*net.TCPListener), other.(*Listener), udp.(*net.UDPConn), file} {
					conn, err := s.SyscallConn()
					require.NoError(t, err)
					var d *descriptor
					require.NoError(t, onFD(conn, func(fd uintptr) (err error) { d, err = duplicate(fd); return err }))
					p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp4", flags: flagBalanced}, d)
					p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp6", flags: flagBalanced}, d)
					d.release()
				}
				d := newDescriptor(unbound)
				d.hold() // it is closed above
				p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp4", flags: flagBalanced}, d)
				for kind := range 32 { // without a sense
					p.send(frame{kind: byte(kind), id: newID(), n: 77, at: place{network: "x", host: "y", port: 1}}, nil)
				}
				close(sent)
			}
			f, d, err = p.read(limit(5 * time.Second))
		}
	})
	ln, err := Listen("tcp4", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	<-sent
	time.Sleep(limit(50 * time.Millisecond))
	require.Equal(t, 1, ln.(*Listener).Info().Sockets)
	c := dialTest(t, ln.Addr())
	acceptWithin(t, ln)
	c.Close()
	require.NoError(t, ln.Close())
}

// What a hub does with a peer that speaks nonsense: it ends the connection, and
// nothing else.
func TestHandoffBadPeer(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	hello := (&frame{kind: frameHello, n: handoffHighest, process: newID(), at: place{network: helloName}}).append(nil)
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
	b := startServer(t, serverJob{Path: path, Address: ln.Addr().String()})
	b.close() // from here on there are its sockets to adopt
	before := openDescriptors()
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
		{"a descriptor that is a file", append(append([]byte{}, hello...), socket...), rights(1), false},
		{"a descriptor without a message", hello, rights(3), false},
		{"too many descriptors", hello, rights(messageDescriptors + 1), true},
		{"very many descriptors", hello, rights(250), true},
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
			conn, err := net.Dial("unix", path)
			require.NoError(t, err)
			u := conn.(*net.UnixConn)
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
			soon(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff != 0 }, "the hub is of no use any more")
			b.close()
		})
	}
}

// A peer that stops reading, and one that is silent, are taken for gone, and
// delay nobody.
func TestHandoffPeerThatStopsReading(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	defer set(&silentAfter, limit(500*time.Millisecond))()
	defer set(&beatEvery, limit(100*time.Millisecond))()
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	p := dialHub(t, path)
	p.hello(1, handoffHighest)
	p.expect(frameHello)
	p.send(frame{kind: frameSynced}, nil)
	p.expect(frameSynced)
	at, _, err := resolved("tcp", ln.Addr().String())
	require.NoError(t, err)
	p.send(frame{kind: frameOn, n: 5, at: at}, nil)
	p.expect(frameReply)
	require.Eventually(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff != 0 }, limit(5*time.Second), time.Millisecond)
	begin := time.Now()
	more, err := Listen("tcp", ln.Addr().String(), WithHandoff(path)) // it doesn't confirm the socket
	require.NoError(t, err)
	require.Less(t, time.Since(begin), exchangeTime)
	require.NoError(t, more.Close())
	p.mu.Lock() // its writer beats no more
	p.isEnded()
	p.mu.Unlock()
	require.Eventually(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff == 0 }, limit(5*time.Second), time.Millisecond)
}

// A peer that sends sockets without end doesn't use up the descriptors of the
// process that is the hub: the last quarter is for its own.
func TestHandoffPeerThatFloods(t *testing.T) {
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "flooded", "LBLISTEN_TEST_PATH="+handoffPath(t)))
}

func floodedWorker() {
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(os.Getenv("LBLISTEN_TEST_PATH")))
	must(err)
	c, err := net.Dial("unix", os.Getenv("LBLISTEN_TEST_PATH"))
	must(err)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	must(err)
	d := newDescriptor(fd)
	must(setFileLimit(128))
	w := newWire(c.(*net.UnixConn))
	w.send(frame{kind: frameHello, n: 1<<16 | 1, process: newID(), at: place{network: helloName}}, nil)
	kept := 0
	for n := range uint32(200) { // one after the other: the system limits descriptors on their way, too
		w.send(frame{kind: frameSocket, n: n + 1, id: newID(), at: place{network: "tcp", host: "::", port: 1}}, d)
		for answered := false; !answered; {
			f, d, err := w.read(limit(10 * time.Second))
			must(err)
			if d != nil {
				d.release()
			}
			if answered = f.kind == frameReply; answered && f.flags&flagOK != 0 {
				kept++
			}
		}
	}
	if kept > 96 {
		panic(fmt.Sprintf("the hub keeps %d sockets", kept))
	}
	for range 8 { // two descriptors each
		_, err := net.Dial("tcp", ln.Addr().String())
		must(err)
		_, err = ln.Accept()
		must(err)
	}
	fmt.Println("ok")
}

// The hello agrees on the lower of two versions, and says so if there is none.
func TestHandoffVersions(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	for _, c := range []struct{ lowest, highest, want uint32 }{{1, 1, 1}, {1, 2, 1}, {0, 1, 1}, {2, 3, 0}, {0, 0, 0}} {
		p := dialHub(t, path)
		p.hello(c.lowest, c.highest)
		f, _ := p.expect(frameHello)
		require.Equal(t, c.want, f.n, "%+v", c)
		if c.want == 0 {
			p.isEnded()
		}
		p.wire.c.Close()
	}
	require.NoError(t, ln.Close())
	fakeHub(t, path, func(p rawPeer) {
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: 0}, nil)
	})
	ln, err = Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	require.ErrorContains(t, ln.(*Listener).Info().Reason, "other versions")
	require.NoError(t, ln.Close())
}
