package lblisten

// Dispatch over listeners and connections that do what package net's never do.

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// oddListener is a listener of TCP whose Accept does something else with every fifth
// connection.
type oddListener struct {
	*net.TCPListener
	n   atomic.Int64
	odd func() (net.Conn, error)
}

func (o *oddListener) Accept() (net.Conn, error) {
	c, err := o.TCPListener.Accept()
	if err == nil && o.n.Add(1)%5 == 0 {
		c.Close()
		return o.odd()
	}
	return c, err
}

// withoutDeadline hides all that net.Listener doesn't have.
type withoutDeadline struct{ net.Listener }

func listenTCP(t testing.TB) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

// An Accept of the listener that panics, exits its goroutine or returns (nil, nil) does
// so to one caller, and harms nobody else; also where a goroutine of the package
// called it, because it can't be interrupted.
func TestOddAccept(t *testing.T) {
	type oddity string
	for name, odd := range map[string]func() (net.Conn, error){
		"panics":  func() (net.Conn, error) { panic(oddity("odd")) },
		"exits":   func() (net.Conn, error) { runtime.Goexit(); return nil, nil },
		"nothing": func() (net.Conn, error) { return nil, nil },
	} {
		for _, hidden := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, no SetDeadline %v", name, hidden), func(t *testing.T) {
				noLeaks(t)
				tcp := listenTCP(t)
				var ln net.Listener = &oddListener{TCPListener: tcp, odd: odd}
				if hidden {
					ln = withoutDeadline{ln}
				}
				g, ls := dispatchTest(t, ln, 3)
				var accepted, met atomic.Int64
				var wg sync.WaitGroup
				for _, l := range ls {
					wg.Add(1)
					go func() {
						defer wg.Done()
						for again := true; again; {
							done := make(chan struct{})
							go func() { // which Accept may end
								returned := false
								defer close(done)
								defer func() {
									if r := recover(); r != nil && r != any(oddity("odd")) {
										panic(r)
									}
									if !returned {
										met.Add(1)
									}
								}()
								c, err := l.Accept()
								returned = true
								var temporary interface{ Temporary() bool }
								switch {
								case err == nil:
									accepted.Add(1)
									c.Close()
								case errors.Is(err, net.ErrClosed):
									again = false
								case errors.As(err, &temporary) && temporary.Temporary():
									met.Add(1)
								default:
									t.Error(err)
								}
							}()
							<-done
						}
					}()
				}
				const n = 40
				for range n {
					dialTest(t, tcp.Addr())
				}
				require.Eventually(t, func() bool { return accepted.Load()+met.Load() == n }, limit(10*time.Second), time.Millisecond)
				require.EqualValues(t, n/5, met.Load())
				require.NoError(t, g.Close())
				wg.Wait()
				t.Logf("%d tried, 0 lost, %d odd", n, met.Load())
			})
		}
	}
}

// slowConn finds out its address by reading from its client, as connections do that
// begin with a PROXY header.
type slowConn struct {
	net.Conn
	asked *atomic.Int64
}

func (c slowConn) RemoteAddr() net.Addr {
	c.asked.Add(1)
	c.Conn.Read(make([]byte, 1))
	return c.Conn.RemoteAddr()
}

type slowListener struct {
	net.Listener
	asked atomic.Int64
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return slowConn{c, &l.asked}, nil
}

// A client that says nothing delays nobody, whatever a connection does to find out its
// address: it isn't asked. Steering by source can't be had so, and Info says so.
func TestSilentClientDelaysNobody(t *testing.T) {
	for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
		t.Run(s.String(), func(t *testing.T) {
			noLeaks(t)
			tcp := listenTCP(t)
			ln := &slowListener{Listener: tcp}
			g, ls := dispatchTest(t, ln, 3, WithSteering(s))
			got := make(chan result, 30)
			for _, l := range ls {
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						got <- result{c, nil}
					}
				}()
				require.Eventually(t, func() bool { return waiting(l) == 1 }, limit(5*time.Second), time.Millisecond)
			}
			for range 10 {
				dialTest(t, tcp.Addr()) // and says nothing
			}
			for range 10 {
				require.NoError(t, get(t, got).err)
			}
			require.Zero(t, ln.asked.Load())
			if s == SteerSource {
				require.ErrorContains(t, g.Info().Reason, "slowConn")
			}
		})
	}
}

// The addresses of a TLS connection are those of the one inside.
func TestAddressesOfKnownTypes(t *testing.T) {
	noLeaks(t)
	ln := listenTCP(t)
	client := dialTest(t, ln.Addr())
	c := acceptWithin(t, ln)
	for _, known := range []net.Conn{c, tls.Server(c, &tls.Config{}), tls.Client(c, &tls.Config{})} {
		_, remote, ok := addrsOf(known)
		require.True(t, ok, "%T", known)
		require.Equal(t, client.LocalAddr().String(), remote.String())
	}
	pipe := newPipeConn(t)
	for _, unknown := range []net.Conn{pipe, pipe.Conn, slowConn{c, new(atomic.Int64)}, tls.Server(pipe, &tls.Config{}), struct{ net.Conn }{c}} {
		_, _, ok := addrsOf(unknown)
		require.False(t, ok, "%T", unknown)
	}
}

// addressless has no address.
type addressless struct{ net.Listener }

func (addressless) Addr() net.Addr { return nil }

// Dispatch of a listener without an address is an error that leaves it alone.
func TestDispatchWithoutAddress(t *testing.T) {
	noLeaks(t)
	tcp := listenTCP(t)
	_, err := Dispatch(addressless{tcp}, 2)
	require.ErrorContains(t, err, "addressless")
	dialTest(t, tcp.Addr())
	acceptWithin(t, tcp)
}

// jealous lets nobody set a deadline while it accepts.
type jealous struct {
	*net.TCPListener
	mu sync.Mutex
}

func (l *jealous) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.TCPListener.Accept()
}

func (l *jealous) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.TCPListener.SetDeadline(t)
}

// A SetDeadline that blocks holds up a Close for a second at most, and no other Accept.
func TestBlockingSetDeadline(t *testing.T) {
	noLeaks(t)
	tcp := listenTCP(t)
	_, ls := dispatchTest(t, &jealous{TCPListener: tcp}, 2)
	one, two := blocked(t, ls[0]), blocked(t, ls[1])
	begin := time.Now()
	require.NoError(t, ls[0].Close()) // it leads, and can't be interrupted
	require.Less(t, time.Since(begin), limit(3*time.Second))
	for range 3 { // the one that was interrupted too late, and the one for the other
		dialTest(t, tcp.Addr())
	}
	get(t, one)
	require.NoError(t, get(t, two).err)
	require.NoError(t, ls[1].Close())
}

// panicky panics when a deadline is set, but for the first one.
type panicky struct {
	*net.TCPListener
	n atomic.Int64
}

func (l *panicky) SetDeadline(t time.Time) error {
	if l.n.Add(1) > 1 {
		panic("odd")
	}
	return l.TCPListener.SetDeadline(t)
}

// A SetDeadline that panics wakes nobody, and harms nobody.
func TestPanickingSetDeadline(t *testing.T) {
	noLeaks(t)
	tcp := listenTCP(t)
	ln := &panicky{TCPListener: tcp}
	_, ls := dispatchTest(t, ln, 2)
	got := blocked(t, ls[0])
	require.NoError(t, ls[0].SetDeadline(longPast))
	require.Eventually(t, func() bool { return ln.n.Load() == 2 }, limit(5*time.Second), time.Millisecond)
	dialTest(t, tcp.Addr())
	require.NoError(t, get(t, got).err)
}

// A serve that exits its goroutine ends nobody else, and Serve returns.
func TestServeThatExits(t *testing.T) {
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithDispatcher())
	var begun atomic.Int64
	served := make(chan error, 1)
	go func() {
		served <- g.Serve(func(l net.Listener) error {
			if begun.Add(1); l == net.Listener(ls[0]) {
				runtime.Goexit()
			}
			_, err := l.Accept()
			return err
		})
	}()
	require.Eventually(t, func() bool { return begun.Load() == 2 && waiting(ls[1]) == 1 }, limit(5*time.Second), time.Millisecond)
	require.Empty(t, served)
	require.NoError(t, g.Close())
	select {
	case err := <-served:
		require.ErrorIs(t, err, net.ErrClosed)
	case <-time.After(limit(5 * time.Second)):
		t.Fatal("Serve doesn't return")
	}
}
