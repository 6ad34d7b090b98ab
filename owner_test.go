package lblisten

// What an Accept costs.

import (
	"net"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// accepters are the listeners that an Accept is compared between.
var accepters = []struct {
	name   string
	listen func() (net.Listener, error)
}{
	{"net", func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }},
	{"reuseport", func() (net.Listener, error) { return Listen("tcp", "127.0.0.1:0", WithReusePort()) }},
	{"kernel", func() (net.Listener, error) { return Listen("tcp", "127.0.0.1:0", WithRequireKernel()) }},
	{"dispatcher", func() (net.Listener, error) { return Listen("tcp", "127.0.0.1:0", WithDispatcher()) }},
}

// prefill is how many connections wait in the queue before it is measured. It
// fits the smallest default backlog, FreeBSD's 128.
const prefill = 100

func fill(tb testing.TB, ln net.Listener) (clients []net.Conn) {
	for range prefill {
		c, err := dialOnce("tcp", ln.Addr().String())
		require.NoError(tb, err)
		clients = append(clients, c)
	}
	return clients
}

// Accept allocates what net's Accept does, and adds no goroutine: five listeners
// have at most the one that a process has.
func TestAcceptAddsNoAllocationAndNoGoroutine(t *testing.T) {
	cost := func(listen func() (net.Listener, error)) (allocs uint64, goroutines int) {
		before := runtime.NumGoroutine()
		var ln net.Listener
		var err error
		for range 5 {
			if ln, err = listen(); err != nil {
				t.Skip(err)
			}
			defer ln.Close()
		}
		allocs = 1 << 60
		for range 5 { // the runtime allocates in the background now and then
			clients := fill(t, ln)
			conns := make([]net.Conn, prefill)
			var m0, m1 runtime.MemStats
			runtime.ReadMemStats(&m0)
			for i := range conns {
				if conns[i], err = ln.Accept(); err != nil {
					t.Fatal(err)
				}
			}
			runtime.ReadMemStats(&m1)
			allocs = min(allocs, m1.Mallocs-m0.Mallocs)
			for i := range conns {
				clients[i].Close()
				conns[i].Close()
			}
		}
		return allocs, runtime.NumGoroutine() - before
	}
	want, _ := cost(accepters[0].listen)
	for _, a := range accepters[2:] {
		t.Run(a.name, func(t *testing.T) {
			noLeaks(t)
			if a.name == "kernel" {
				modes[0].need(t)
			}
			allocs, goroutines := cost(a.listen)
			t.Logf("%d allocations in %d Accepts, net: %d", allocs, prefill, want)
			more := uint64(prefill / 10) // of the runtime's own
			if a.name == "dispatcher" {
				more = prefill // under the race detector a sync.Pool forgets some
			}
			require.LessOrEqual(t, allocs, want+more)
			// At most that of the process which looks again, on Linux; one of an
			// earlier test may have ended meanwhile.
			require.LessOrEqual(t, goroutines, 1)
		})
	}
}

// BenchmarkAccept measures Accept from a queue that is never empty: time, bytes
// and allocations for each connection.
func BenchmarkAccept(b *testing.B) {
	for _, a := range accepters {
		b.Run(a.name, func(b *testing.B) {
			ln, err := a.listen()
			if err != nil {
				b.Skip(err)
			}
			defer ln.Close()
			b.ReportAllocs()
			conns := make([]net.Conn, 0, prefill)
			for left := b.N; left > 0; left -= prefill {
				b.StopTimer()
				clients := fill(b, ln)
				n := min(left, prefill)
				b.StartTimer()
				for range n {
					c, err := ln.Accept()
					if err != nil {
						b.Fatal(err)
					}
					conns = append(conns, c)
				}
				b.StopTimer()
				for range prefill - n {
					c, err := ln.Accept()
					require.NoError(b, err)
					conns = append(conns, c)
				}
				for i := range conns {
					clients[i].Close()
					conns[i].Close()
				}
				conns = conns[:0]
				b.StartTimer()
			}
		})
	}
}
