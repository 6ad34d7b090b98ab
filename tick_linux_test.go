package lblisten

// The look that is taken once a second.

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Groups begin and end to be looked after from many goroutines, so that the one
// that looks ends and starts again all the time; and a group that stays is looked
// after meanwhile. Nothing is left in the end.
func TestKeepLooking(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	idle := func() bool { return lookedAfter() == 0 }
	require.True(t, idle())
	churn := func(goroutines int, goOn func() bool) (n int64) {
		var wg sync.WaitGroup
		var starts atomic.Int64
		for i := range goroutines {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for goOn() {
					stop := everySecond(func() {})
					if starts.Add(1)%int64(i+2) == 0 {
						time.Sleep(50 * time.Microsecond)
					}
					stop()
				}
			}()
		}
		wg.Wait()
		return starts.Load()
	}
	until := time.Now().Add(period(300 * time.Millisecond))
	n := churn(1, func() bool { return time.Now().Before(until) }) // each is the first and the last
	until = time.Now().Add(period(300 * time.Millisecond))
	n += churn(4, func() bool { return time.Now().Before(until) })
	require.True(t, idle())

	var looks atomic.Int64
	stop := everySecond(func() { looks.Add(1) })
	late := time.Now().Add(limit(20 * time.Second))
	n += churn(4, func() bool { return looks.Load() < 2 && time.Now().Before(late) })
	require.GreaterOrEqual(t, looks.Load(), int64(2), "it isn't looked after")
	stop()
	require.True(t, idle())
	t.Logf("%d began and ended", n)
}
