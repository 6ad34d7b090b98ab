//go:build unix

package lblisten

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// An error of a shared socket reaches one of the Accepts that wait, not all.
func TestOneErrorReachesOneAccept(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "oneError"))
}

func oneErrorWorker() {
	retryAfter = time.Hour // then the socket is offered again, to another one
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 12, WithRequireKernel())
	must(err)
	ls := g.Listeners()
	for !ownQueued(ls[0]) {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	// Everybody else has an empty queue and waits.
	for _, l := range ls[1:] {
		for ownQueued(l) {
			_, err := l.Accept()
			must(err)
		}
	}
	errs := make(chan error, len(ls))
	for _, l := range ls[1:] {
		go func() {
			_, err := l.Accept()
			errs <- err
		}()
		for waiting(l) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	files := useUpDescriptors()
	must(ls[0].Close())
	if err := <-errs; !errors.Is(err, unix.EMFILE) {
		panic(fmt.Sprintf("Accept returned %v, want EMFILE", err))
	}
	time.Sleep(limit(100 * time.Millisecond))
	if len(errs) != 0 {
		panic(fmt.Sprintf("%d more Accepts returned: %v", len(errs), <-errs))
	}
	runtime.KeepAlive(files) // a file that is collected is closed
	fmt.Println("ok")
}
