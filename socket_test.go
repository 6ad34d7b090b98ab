package lblisten

// Sockets: the length of their queues.

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Queues that are full lose nothing: what the kernel doesn't let in tries again,
// and all are served when somebody accepts.
func TestFullQueue(t *testing.T) {
	beside(t)
	if !setsBacklog() {
		t.Skipf("a queue's length can't be set on %s", runtime.GOOS)
	}
	inModes(t, func(t *testing.T, m mode) {
		for backlog := 1; backlog <= 8; backlog *= 2 { // each tries again at the same time
			g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt, WithBacklog(backlog))
			n := 6*backlog + 4
			var served, refused atomic.Int64
			var wg, clients sync.WaitGroup
			t.Cleanup(func() { g.Close(); wg.Wait() })
			for range n {
				clients.Add(1)
				go func() {
					defer clients.Done()
					for begin := time.Now(); time.Since(begin) < limit(20*time.Second); refused.Add(1) {
						d := new(load)
						if d.one("tcp", g.Addr().String()); d.served.Load() == 1 {
							served.Add(1)
							return
						}
						time.Sleep(10 * time.Millisecond)
					}
				}()
			}
			full := func() bool {
				queued, most := g.Stats().Queued, g.Stats().Backlog
				return queued < 0 || queued >= most
			}
			require.Eventually(t, full, limit(10*time.Second), time.Millisecond)
			queued := g.Stats().Queued
			var accepted atomic.Int64
			for _, l := range ls {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
			t.Cleanup(func() {
				clients.Wait()
				g.Close()
				wg.Wait()
				t.Logf("backlog %d: %d tried, %d lost; %d waited in full queues, %d tries were refused", backlog, n, n-int(served.Load()), queued, refused.Load())
				if int(served.Load()) != n {
					t.Errorf("%d of %d were served", served.Load(), n)
				}
			})
		}
	})
}
