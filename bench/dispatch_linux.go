package main

// What the dispatcher itself costs, without a kernel: it dispatches a listener
// that returns a connection at once.

import (
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/lblisten/lblisten"
)

// instant is a listener whose Accept does nothing but choose a connection.
type instant struct{ conns []net.Conn }

// fakeConn has addresses, by which the dispatcher chooses a member.
type fakeConn struct {
	net.Conn
	local, remote *net.TCPAddr
}

func (c *fakeConn) LocalAddr() net.Addr  { return c.local }
func (c *fakeConn) RemoteAddr() net.Addr { return c.remote }

func newInstant() *instant {
	ln := new(instant)
	local := ln.Addr().(*net.TCPAddr)
	for port := range 1024 {
		ln.conns = append(ln.conns, &fakeConn{local: local, remote: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 32768 + 2*port}})
	}
	return ln
}

func (ln *instant) Accept() (net.Conn, error)   { return ln.conns[rand.Uint32()%1024], nil }
func (ln *instant) Close() error                { return nil }
func (ln *instant) SetDeadline(time.Time) error { return nil }
func (ln *instant) Addr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80} }

// limited returns so many connections as it is let to, and then waits.
type limited struct {
	*instant
	mu      sync.Mutex
	changed sync.Cond
	left    int
	past    bool // the deadline
}

func (ln *limited) Accept() (net.Conn, error) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for ln.left == 0 && !ln.past {
		ln.changed.Wait()
	}
	if ln.past {
		return nil, os.ErrDeadlineExceeded
	}
	ln.left--
	return ln.instant.Accept()
}

func (ln *limited) SetDeadline(t time.Time) error {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.past = !t.IsZero() && time.Until(t) <= 0
	ln.changed.Broadcast()
	return nil
}

func (ln *limited) let(n int) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.left = n
	ln.changed.Broadcast()
}

// choice is a batch of connections to n members that all wait, one connection
// after the other, and what ends it.
func choice(n int) (batch func() (time.Duration, int, error), done func(), err error) {
	ln := &limited{instant: newInstant()}
	ln.changed.L = &ln.mu
	g, err := lblisten.Dispatch(ln, n)
	if err != nil {
		return nil, nil, err
	}
	accepted := make(chan struct{})
	served := make(chan error, 1)
	go func() {
		served <- g.Serve(func(ln net.Listener) error {
			for {
				if _, err := ln.Accept(); err != nil {
					return err
				}
				accepted <- struct{}{}
			}
		})
	}()
	return func() (time.Duration, int, error) {
			const each = 1 << 11
			began := processCPU()
			for range each {
				ln.let(1)
				select {
				case <-accepted:
				case err := <-served:
					return 0, 0, err
				}
			}
			return processCPU() - began, each, nil
		}, func() {
			g.Close()
			<-served
		}, nil
}

// acceptEach lets each listener's goroutine accept n connections.
func acceptEach(lns []net.Listener, n int) error {
	if len(lns) == 1 {
		return acceptSome(lns[0], n)
	}
	errs := make([]error, len(lns))
	var all sync.WaitGroup
	for i, ln := range lns {
		all.Add(1)
		go func() {
			defer all.Done()
			errs[i] = acceptSome(ln, n)
		}()
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func acceptSome(ln net.Listener, n int) error {
	for range n {
		if _, err := ln.Accept(); err != nil {
			return err
		}
	}
	return nil
}

func measureDispatchOverhead(opt *options, t *Table) error {
	t.About = "What lblisten.Dispatch adds to a listener that returns a connection at once, without a system call: CPU time of the process and allocations for each Accept. " +
		"Four members with one goroutine: the other three are busy. With four goroutines, each member has one."
	t.Key, t.Columns = "Dispatch", []string{"ns of CPU", "ns added", "allocs added"}
	direct := newInstant()
	type setup struct {
		name    string
		lns     []net.Listener
		compare int // with which row
	}
	setups := []setup{
		{"directly, 1 goroutine", []net.Listener{direct}, 0},
		{"directly, 4 goroutines", []net.Listener{direct, direct, direct, direct}, 1},
	}
	for _, s := range []struct {
		name                string
		members, goroutines int
	}{{"1 member, 1 goroutine", 1, 1}, {"4 members, 1 goroutine", 4, 1}, {"4 members, 4 goroutines", 4, 4}} {
		g, err := lblisten.Dispatch(newInstant(), s.members)
		if err != nil {
			return err
		}
		defer g.Close()
		var lns []net.Listener
		for _, l := range g.Listeners()[:s.goroutines] {
			lns = append(lns, l)
		}
		setups = append(setups, setup{s.name, lns, s.goroutines / 4})
	}
	const batch = 40000
	var probes []probe
	for _, s := range setups {
		probes = append(probes, probe{s.name, func() (time.Duration, int, error) {
			began := processCPU()
			err := acceptEach(s.lns, batch/len(s.lns))
			return processCPU() - began, batch, err
		}})
	}
	c, err := compare(opt, probes)
	if err != nil {
		return err
	}
	allocs := make([]float64, len(setups))
	err = withoutGC(func() error {
		for i, s := range setups {
			// Fewer than a hundredth are the goroutines of this measurement.
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err := acceptEach(s.lns, batch/len(s.lns)); err != nil {
				return err
			}
			runtime.ReadMemStats(&after)
			allocs[i] = float64((after.Mallocs - before.Mallocs) * 100 / batch / 100)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, s := range setups {
		var added []float64
		for b := range c[i] {
			added = append(added, c[i][b]-c[s.compare][b])
		}
		row := t.row(s.name, num("%.0f", c.median(i)), num("%.0f", median(added)), num("%.0f", allocs[i]-allocs[s.compare]))
		if i != s.compare {
			row.atMost("ns added", median(added), 150)
			row.exactly("allocs added", allocs[i]-allocs[s.compare], 0)
		}
	}
	return nil
}
