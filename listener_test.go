package lblisten

// A listener as its user sees it, with package net's as the oracle.

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/cpu"
)

// tcpListener is what net's listener and ours have in common.
type tcpListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
	AcceptTCP() (*net.TCPConn, error)
	File() (*os.File, error)
}

// Whatever is done to a listener of package net and to one of ours, in any mode
// and with any number of siblings, gives the same answer: net's is the oracle.
func TestContract(t *testing.T) {
	beside(t)
	past := time.Now().Add(-time.Hour)
	accept := func(l tcpListener) error {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
		return err
	}
	scenarios := []struct {
		name string
		do   func(t *testing.T, l tcpListener) []error
	}{
		{"accept", func(t *testing.T, l tcpListener) []error {
			dialTest(t, l.Addr())
			return []error{accept(l)}
		}},
		{"AcceptTCP", func(t *testing.T, l tcpListener) []error {
			dialTest(t, l.Addr())
			c, err := l.AcceptTCP()
			require.NotNil(t, c)
			c.Close()
			return []error{err}
		}},
		{"close twice", func(t *testing.T, l tcpListener) []error { return []error{l.Close(), l.Close()} }},
		{"accept after close", func(t *testing.T, l tcpListener) []error {
			l.Close()
			c, err := l.AcceptTCP()
			require.Nil(t, c)
			return []error{accept(l), err}
		}},
		{"close a blocked accept", func(t *testing.T, l tcpListener) []error {
			time.AfterFunc(20*time.Millisecond, func() { l.Close() })
			return []error{accept(l)}
		}},
		{"close three blocked accepts", func(t *testing.T, l tcpListener) []error {
			errs := make(chan error)
			for range 3 {
				go func() { errs <- accept(l) }()
			}
			time.Sleep(20 * time.Millisecond)
			l.Close()
			return []error{<-errs, <-errs, <-errs}
		}},
		{"past deadline", func(t *testing.T, l tcpListener) []error { return []error{l.SetDeadline(past), accept(l), accept(l)} }},
		{"past deadline with a connection waiting", func(t *testing.T, l tcpListener) []error {
			dialTest(t, l.Addr())
			return []error{l.SetDeadline(past), accept(l), l.SetDeadline(time.Time{}), accept(l)}
		}},
		{"deadline ends a blocked accept", func(t *testing.T, l tcpListener) []error {
			return []error{l.SetDeadline(time.Now().Add(20 * time.Millisecond)), accept(l), accept(l)}
		}},
		{"deadline set while accept blocks", func(t *testing.T, l tcpListener) []error {
			time.AfterFunc(20*time.Millisecond, func() { l.SetDeadline(past) })
			return []error{accept(l)}
		}},
		{"deadline ends three blocked accepts", func(t *testing.T, l tcpListener) []error {
			errs := make(chan error)
			for range 3 {
				go func() { errs <- accept(l) }()
			}
			time.Sleep(20 * time.Millisecond)
			l.SetDeadline(time.Now().Add(10 * time.Millisecond))
			return []error{<-errs, <-errs, <-errs}
		}},
		{"deadline taken back", func(t *testing.T, l tcpListener) []error {
			l.SetDeadline(past)
			l.SetDeadline(time.Time{})
			dialTest(t, l.Addr())
			return []error{accept(l)}
		}},
		{"deadline put off", func(t *testing.T, l tcpListener) []error {
			l.SetDeadline(time.Now().Add(time.Millisecond))
			l.SetDeadline(time.Now().Add(time.Hour))
			time.AfterFunc(20*time.Millisecond, func() {
				if c, err := dialOnce("tcp", l.Addr().String()); err == nil {
					defer c.Close()
					c.Read(make([]byte, 1))
				}
			})
			return []error{accept(l)}
		}},
		{"deadline after close", func(t *testing.T, l tcpListener) []error {
			l.Close()
			return []error{l.SetDeadline(past)}
		}},
		{"file", func(t *testing.T, l tcpListener) []error {
			f, err := l.File()
			require.NoError(t, err)
			ln, err := net.FileListener(f)
			require.NoError(t, err)
			require.Equal(t, l.Addr().String(), ln.Addr().String())
			return []error{f.Close(), ln.Close()}
		}},
		{"file after close", func(t *testing.T, l tcpListener) []error {
			l.Close()
			_, err := l.File()
			return []error{err}
		}},
		{"control", func(t *testing.T, l tcpListener) []error {
			c, err := l.SyscallConn()
			require.NoError(t, err)
			called := false
			err = c.Control(func(fd uintptr) { called = fd != 0 })
			require.True(t, called)
			return []error{err, c.Read(func(uintptr) bool { return true }), c.Write(func(uintptr) bool { return true })}
		}},
	}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			if runtime.GOOS == "windows" && (s.name == "file" || s.name == "file after close") {
				t.Skip("package net has no File on Windows")
			}
			plain, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer plain.Close()
			oracle := s.do(t, plain.(*net.TCPListener))
			var want []string
			for _, err := range oracle {
				want = append(want, text(err, plain.Addr()))
			}
			for _, members := range []int{1, 3} {
				inModes(t, func(t *testing.T, m mode) {
					_, ls := newTestGroup(t, members, "tcp", "127.0.0.1:0", m.opt)
					for _, l := range ls[1:] {
						if m.name == "kernel" || s.name == "accept" {
							require.NoError(t, l.Close()) // so that everything comes to the one
						}
					}
					for i, err := range s.do(t, ls[0]) {
						require.Equal(t, want[i], text(err, ls[0].Addr()), "step %d", i)
						requireSameKind(t, oracle[i], err)
					}
				})
			}
		})
	}
}

// requireSameKind compares errors as programs do.
func requireSameKind(t *testing.T, want, got error) {
	t.Helper()
	require.IsType(t, want, got)
	for _, kind := range []error{net.ErrClosed, os.ErrDeadlineExceeded, syscall.EINVAL} {
		require.Equal(t, errors.Is(want, kind), errors.Is(got, kind), "%v is %v", got, kind)
	}
	var w, g net.Error
	require.Equal(t, errors.As(want, &w), errors.As(got, &g))
	if w != nil {
		require.Equal(t, w.Timeout(), g.Timeout())
	}
}

// Accept hands out the connections of package net themselves.
func TestAcceptReturnsBareConnections(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		dialTest(t, ls[0].Addr())
		ls[1].Close()
		c := acceptWithin(t, ls[0])
		require.IsType(t, (*net.TCPConn)(nil), c)
		require.Equal(t, ls[0].Addr().String(), c.LocalAddr().String())
	})
}

// A failing Accept returns an untyped nil connection.
func TestFailedAcceptReturnsNil(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 1, "tcp", "127.0.0.1:0", m.opt)
		ls[0].SetDeadline(time.Unix(1, 0))
		c, err := ls[0].Accept()
		require.Error(t, err)
		require.True(t, c == nil)
	})
}

// Close may be called from many goroutines; one of them closes.
func TestCloseFromManyGoroutines(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		got := blocked(t, ls[0])
		var wg sync.WaitGroup
		errs := make(chan error, 16)
		for range 16 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				errs <- ls[0].Close()
			}()
		}
		wg.Wait()
		closed := 0
		for range 16 {
			if err := <-errs; err == nil {
				closed++
			} else {
				require.ErrorIs(t, err, net.ErrClosed)
			}
		}
		require.Equal(t, 1, closed)
		require.ErrorIs(t, get(t, got).err, net.ErrClosed)
	})
}

// Deadlines hold while a shared socket is full, and while kicks come and go.
func TestDeadlineWithInheritedQueue(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		queueUp(t, ls[0].Addr(), 20)
		require.NoError(t, ls[1].Close())
		ls[0].SetDeadline(time.Unix(1, 0))
		for range 5 {
			_, err := ls[0].Accept()
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		}
		ls[0].SetDeadline(time.Time{})
		for range 20 {
			acceptWithin(t, ls[0])
		}
		_, err := acceptBy(ls[0], 20*time.Millisecond)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	})
}

// A member's deadline is its own, also where all members share a socket.
func TestDeadlineIsTheMembersOwn(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
		a, b := blocked(t, ls[0]), blocked(t, ls[1])
		require.NoError(t, ls[0].SetDeadline(time.Now().Add(10*time.Millisecond)))
		require.ErrorIs(t, get(t, a).err, os.ErrDeadlineExceeded)
		select {
		case r := <-b:
			t.Fatalf("another member's Accept returned %v", r.err)
		case <-time.After(20 * time.Millisecond):
		}
		ls[0].Close()
		ls[2].Close()
		dialTest(t, ls[1].Addr())
		require.NoError(t, get(t, b).err)
	})
}

// A closed listener says so, and keeps its counters.
func TestClosedListener(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		_, ls := newTestGroup(t, 1, "tcp", "127.0.0.1:0", m.opt)
		dialTest(t, ls[0].Addr())
		acceptWithin(t, ls[0])
		require.NoError(t, ls[0].Close())
		require.Equal(t, Stats{Accepted: 1}, ls[0].Stats())
		i := ls[0].Info()
		require.Equal(t, BalancerNone, i.Balancer)
		require.ErrorIs(t, i.Reason, net.ErrClosed)
		require.NotNil(t, ls[0].Addr())
	})
}

// What every Accept of a member writes has cache lines of its own: neither other
// members nor what all of them read is on them.
func TestCountersShareNoCacheLine(t *testing.T) {
	line := unsafe.Sizeof(cpu.CacheLinePad{})
	for _, f := range hotFields() {
		require.GreaterOrEqual(t, f.begin, f.before+line, f.name)
		require.GreaterOrEqual(t, f.after, f.end+line, f.name)
	}
}
