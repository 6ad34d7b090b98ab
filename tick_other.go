//go:build unix && !linux && !aix

package lblisten

import "time"

// lookEvery is the least time between two calls.
const lookEvery = time.Second

// callNowAndThen calls something every so many units of lookEvery, until stop; it may be
// in that call then.
func callNowAndThen(call func(), units func() int) (stop func()) {
	quit := make(chan struct{})
	go func() {
		for {
			select {
			case <-quit:
				return
			case <-time.After(time.Duration(units()) * lookEvery):
				call()
			}
		}
	}()
	return func() { close(quit) }
}
