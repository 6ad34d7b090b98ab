package lblisten

// Clients: those that stand in a queue, those that count, and who answers them.

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lblisten/lblisten/internal/joining"
)

// dialTest connects to a; the connection is reset when the test ends.
func dialTest(t testing.TB, a net.Addr) net.Conn {
	t.Helper()
	c, err := dialOnce(a.Network(), dialable(a))
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// dialable is an address to dial a listener's address by.
func dialable(a net.Addr) string {
	if tcp, ok := a.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", strconv.Itoa(tcp.Port))
	}
	return a.String()
}

// dialOnce connects; closing the connection resets it, so that no port is kept
// busy by TIME_WAIT.
func dialOnce(network, address string) (net.Conn, error) {
	c, err := net.DialTimeout(network, address, limit(10*time.Second))
	if err != nil {
		return nil, err
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	return c, nil
}

// queueUp connects n clients, each of which sends its number.
func queueUp(t testing.TB, a net.Addr, n int) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = dialTest(t, a)
		_, err := fmt.Fprintf(conns[i], "%d\n", i)
		require.NoError(t, err)
	}
	return conns
}

// queued is n, but no more than fit into the accept queues of so many sockets, which needn't
// get the same each: FreeBSD's are of 128 by default, and an older gVisor's.
func queued(n, sockets int) int {
	if b := backlog(); b > 0 {
		n = min(n, sockets*b/2)
	}
	return n
}

// queues is how many sockets n members have.
func queues(dispatcher bool, n int) int {
	if dispatcher {
		return 1
	}
	return n
}

// backlog is the length of an accept queue, or -1. Where the kernel doesn't tell, it is what
// package net asks for on Linux.
var backlog = sync.OnceValue(func() int {
	ln, err := Listen("tcp4", "127.0.0.1:0", WithDispatcher())
	if err != nil {
		panic(err)
	}
	defer ln.Close()
	if b := ln.(*Listener).Stats().Backlog; b > 0 {
		return b
	}
	most, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	if err != nil {
		return -1
	}
	b, err := strconv.Atoi(strings.TrimSpace(string(most)))
	if err != nil {
		return -1
	}
	return b
})

// standing connects n clients to servers that don't accept.
func standing(t testing.TB, address string, n int) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := dialOnce("tcp", address)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		conns[i] = c
	}
	return conns
}

// answer reads the number of a client that queueUp made and sends it back.
func answer(t testing.TB, c net.Conn) int {
	t.Helper()
	c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
	var n int
	_, err := fmt.Fscanf(c, "%d\n", &n)
	require.NoError(t, err)
	_, err = fmt.Fprintf(c, "%d\n", n)
	require.NoError(t, err)
	return n
}

// wantAnswer reads what answer sent.
func wantAnswer(t testing.TB, c net.Conn, want int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
	var n int
	_, err := fmt.Fscanf(c, "%d\n", &n)
	require.NoError(t, err)
	require.Equal(t, want, n)
}

// echo accepts until the listener is closed, sends the first byte of each
// connection back, and closes it when its client does.
func echo(wg *sync.WaitGroup, l net.Listener, accepted *atomic.Int64) {
	defer wg.Done()
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			panic(fmt.Sprintf("accept: %v", err))
		}
		accepted.Add(1)
		wg.Add(1)
		go func() {
			defer wg.Done()
			echoConn(c)
		}()
	}
}

// echoConn sends the first byte of a connection back, and closes it when its
// client does.
func echoConn(c net.Conn) {
	defer c.Close()
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err == nil {
		c.Write(b[:])
		io.Copy(io.Discard, c)
	}
}

// answered counts the clients that get an answer.
func answered(conns []net.Conn) int {
	var n atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(limit(20 * time.Second))
	for _, c := range conns {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c.SetDeadline(deadline)
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err == nil {
				n.Add(1)
			}
		}()
	}
	wg.Wait()
	return int(n.Load())
}

// load dials from several goroutines; each client sends a byte and waits for it
// to come back.
type load struct {
	pause                   time.Duration // of each client after each connection
	served, refused, failed atomic.Int64
	turnedAway              atomic.Int64
	firstErr                atomic.Pointer[error]
	stop                    atomic.Bool
	wg                      sync.WaitGroup
}

func (d *load) one(network, address string) {
	c, err := dialOnce(network, address)
	if isRefused(err) {
		d.refused.Add(1)
	}
	if joining.TurnedAway(err) {
		d.turnedAway.Add(1)
	}
	if err == nil {
		c.SetDeadline(time.Now().Add(limit(10 * time.Second)))
		b := [1]byte{'x'}
		if _, err = c.Write(b[:]); err == nil {
			_, err = io.ReadFull(c, b[:])
		}
		c.Close()
	}
	if err != nil {
		d.failed.Add(1)
		err = fmt.Errorf("after %d: %w", d.served.Load(), err)
		d.firstErr.CompareAndSwap(nil, &err)
		return
	}
	d.served.Add(1)
}

// end stops the load and fails the test for every client that was not served.
// FreeBSD 14 turns away connections of the instant in which a further socket opens; with
// opens, exactly those are allowed there.
func (d *load) end(t testing.TB, opens bool) {
	t.Helper()
	d.stop.Store(true)
	d.wg.Wait()
	failed, refused := d.failed.Load(), d.refused.Load()
	t.Logf("%d tried, %d lost, %d refused", d.served.Load()+failed, failed-refused, refused)
	if opens {
		failed -= d.turnedAway.Load()
	}
	if failed != 0 {
		t.Fatalf("%d clients were not served, %d of them refused; the first: %v", failed, refused, *d.firstErr.Load())
	}
	require.NotZero(t, d.served.Load())
}

func startLoad(clients int, network, address string) *load {
	return startPaced(0, clients, network, address)
}

// startPaced is startLoad with clients that pause.
func startPaced(pause time.Duration, clients int, network, address string) *load {
	d := &load{pause: pause}
	for range clients {
		d.wg.Add(1)
		go func() {
			defer d.wg.Done()
			for !d.stop.Load() {
				d.one(network, address)
				time.Sleep(d.pause)
			}
		}()
	}
	return d
}
