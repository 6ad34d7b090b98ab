package lblisten

// How evenly connections are spread, by the kernel and by the dispatcher.

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Each of 2, 4, 16 and 200 members gets more than an eighth of its fair share,
// and none of the connections is missing.
func TestBalance(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range endpoints {
			for _, n := range []int{2, 4, 16, 200} {
				t.Run(fmt.Sprintf("%s/%d", e.name, n), func(t *testing.T) {
					if n == 200 && hurry > 1 && e != endpoints[0] {
						t.Skip("with -short 200 members are tried by IPv4 only")
					}
					e.need(t)
					balance(t, n, max(size(1024, 128), 32*n), e, m)
				})
			}
		}
	})
}

// The same with 16 listeners and 16384 connections.
func TestBalance16384(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) { balance(t, 16, count(16384, 1024), endpoints[0], m) })
}

func balance(t *testing.T, n, conns int, e endpoint, m mode) {
	g, ls := newTestGroup(t, n, e.network, e.listen, m.opt)
	var wg sync.WaitGroup
	got := make([]atomic.Int64, n)
	for i, l := range ls {
		wg.Add(1)
		go echo(&wg, l, &got[i])
	}
	for _, l := range ls {
		require.Eventually(t, func() bool { return waiting(l) > 0 }, limit(5*time.Second), time.Millisecond)
	}
	d := new(load)
	var left atomic.Int64
	left.Store(int64(conns))
	for range 16 {
		d.wg.Add(1)
		go func() {
			defer d.wg.Done()
			for left.Add(-1) >= 0 {
				d.one("tcp", e.of(g.Addr()))
			}
		}()
	}
	d.wg.Wait()
	d.end(t, false)
	stats := g.Stats()
	require.NoError(t, g.Close())
	wg.Wait()
	sum, least, most := int64(0), int64(conns), int64(0)
	for i := range got {
		sum, least, most = sum+got[i].Load(), min(least, got[i].Load()), max(most, got[i].Load())
	}
	t.Logf("%d connections over %d listeners: %d to %d each", sum, n, least, most)
	require.EqualValues(t, conns, sum)
	require.EqualValues(t, conns, stats.Accepted)
	require.Greater(t, least, int64(conns/n/8), "the least of %d", n)
}
