package lblisten

// The turn of an address: whatever ends a Listen or a Close, the next one goes on.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// endings are the ways in which code of the user's may end.
var endings = map[string]func() error{
	"panics":  func() error { panic("odd") },
	"exits":   func() error { runtime.Goexit(); return nil },
	"returns": func() error { return errors.New("odd") },
}

// inItsGoroutine runs f, which may panic or exit.
func inItsGoroutine(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { recover() }()
		f()
	}()
	<-done
}

func needControl(t testing.TB) {
	t.Helper()
	switch runtime.GOOS {
	case "plan9", "js", "wasip1":
		t.Skip("package net calls no Control here")
	}
}

// listenSoon listens, and fails the test if that has to wait for somebody who never
// gives the turn back.
func listenSoon(t testing.TB, address string, opts ...Option) *Listener {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit(5*time.Second))
	defer cancel()
	l, err := ListenContext(ctx, "tcp", address, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*Listener)
}

// freeAddress is an address on which nobody listens.
func freeAddress(t testing.TB) string {
	t.Helper()
	ln := listenTCP(t)
	require.NoError(t, ln.Close())
	return ln.Addr().String()
}

// A Control that panics, exits its goroutine or fails leaves a working registry: at
// the socket that finds out the place and at the one that is to be bound, for the
// first member and for a later one.
func TestControlThatEndsOddly(t *testing.T) {
	needControl(t)
	inModes(t, func(t *testing.T, m mode) {
		for name, end := range endings {
			for _, at := range []int64{1, 2} {
				for _, siblings := range []int{0, 2} {
					address := freeAddress(t)
					var ls []*Listener
					for range siblings {
						ls = append(ls, listenSoon(t, address, m.opt))
					}
					var calls atomic.Int64
					lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
						if calls.Add(1) != at {
							return nil
						}
						if name != "returns" {
							closeDescriptor(c) // which package net leaves open, then
						}
						return end()
					}}
					inItsGoroutine(func() {
						if l, err := Listen("tcp", address, m.opt, WithListenConfig(lc)); err == nil {
							l.Close() // nothing was opened for it
						}
					})
					next := listenSoon(t, address, m.opt)
					require.Equal(t, siblings+1, next.Info().Members, "%s, call %d", name, at)
					dialTest(t, next.Addr())
					for _, l := range append(ls, next) {
						require.NoError(t, l.Close())
					}
				}
			}
		}
	})
}

// oddHandler is a logger that ends oddly, once.
type oddHandler struct {
	slog.Handler
	end  func() error
	once *sync.Once
}

func (h oddHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h oddHandler) Handle(context.Context, slog.Record) error {
	h.once.Do(func() { h.end() })
	return nil
}

// A logger that panics or exits its goroutine leaves a working registry. A Listen that
// doesn't return leaves no member that nobody accepts from.
func TestLoggerThatEndsOddly(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for name, end := range endings {
			if name == "returns" {
				continue
			}
			address := freeAddress(t)
			sibling := listenSoon(t, address, m.opt)
			odd := func() Option { return WithLogger(slog.New(oddHandler{end: end, once: new(sync.Once)})) }
			inItsGoroutine(func() { Listen("tcp", address, m.opt, odd()) })
			require.Equal(t, 1, sibling.Info().Members, "the member of a Listen that %s", name)
			log := odd()
			var l *Listener
			inItsGoroutine(func() { Listen("tcp", address, m.opt, log) }) // once
			l = listenSoon(t, address, m.opt, log)
			require.Equal(t, 2, sibling.Info().Members)
			require.NoError(t, l.Close())
			require.NoError(t, sibling.Close())
			require.NoError(t, listenSoon(t, address, m.opt).Close())
		}
	})
}

// A context that has ended matters only where there is something to wait for, as in
// package net: here, while another Listen opens a socket of the address.
func TestContextThatHasEnded(t *testing.T) {
	needControl(t)
	inModes(t, func(t *testing.T, m mode) {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		address := freeAddress(t)
		for range 2 {
			l, err := ListenContext(ended, "tcp", address, m.opt)
			require.NoError(t, err)
			defer l.Close()
		}
		busy, goOn := make(chan struct{}), make(chan struct{})
		var calls atomic.Int64
		lc := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
			if calls.Add(1) == 2 {
				close(busy)
				<-goOn
			}
			return nil
		}}
		other := freeAddress(t)
		first := make(chan result, 1)
		go func() {
			l, err := Listen("tcp", other, m.opt, WithListenConfig(lc))
			if err == nil {
				l.Close()
			}
			first <- result{nil, err}
		}()
		<-busy
		_, err := ListenContext(ended, "tcp", other, m.opt)
		require.ErrorIs(t, err, context.Canceled)
		require.IsType(t, (*net.OpError)(nil), err)
		close(goOn)
		require.NoError(t, get(t, first).err)
	})
}

// Many open and close listeners of a few addresses at once: each Listen returns a
// listener, and when all are closed nothing is left and the ports are free.
func TestOpenAndCloseAtOnce(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		addresses := []string{freeAddress(t), freeAddress(t)}
		until := time.Now().Add(period(time.Second))
		var opened atomic.Int64
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for n := 0; time.Now().Before(until); n++ {
					l, err := Listen("tcp", addresses[(i+n)%2], m.opt)
					if err != nil {
						t.Error(err)
						return
					}
					opened.Add(1)
					if n%3 == 0 {
						runtime.Gosched()
					}
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				}
			}()
		}
		wg.Wait()
		require.Zero(t, openAddresses())
		for _, a := range addresses {
			ln, err := net.Listen("tcp", a)
			require.NoError(t, err)
			require.NoError(t, ln.Close())
		}
		t.Logf("%d opened and closed", opened.Load())
	})
}

// A shared listener's name is in what it says of itself.
func TestListenerString(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		l := listenSoon(t, "127.0.0.1:0", m.opt)
		require.Equal(t, fmt.Sprintf("tcp %v (%v)", l.Addr(), l.Info().Balancer), l.String())
	})
}
