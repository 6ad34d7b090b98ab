//go:build unix

package lblisten

// Accept without descriptors, and in a process that is stopped.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// needKeptQueue skips where accept(2) takes a connection for which it has no descriptor, and
// drops it: so does gVisor's, also net.Listen's. Nobody can accept without losing then.
func needKeptQueue(t *testing.T) {
	t.Helper()
	if out := keptQueue(t); out != "kept\n" {
		t.Skip("accept(2) that fails with EMFILE drops the connection: net.Listen's second Accept: " + out)
	}
}

// keptQueue returns what a process without descriptors has found out about that, once.
func keptQueue(t *testing.T) string {
	keptQueueOnce.Do(func() { keptQueueOut = runWorker(t, "acceptsInVain") })
	return keptQueueOut
}

var (
	keptQueueOnce sync.Once
	keptQueueOut  string
)

func acceptsInVainWorker() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	c, err := net.Dial("tcp", ln.Addr().String())
	must(err)
	files := useUpDescriptors()
	if _, err := ln.Accept(); !errors.Is(err, unix.EMFILE) {
		panic(fmt.Sprintf("Accept returned %v, want EMFILE", err))
	}
	for _, f := range files {
		f.Close()
	}
	ln.(*net.TCPListener).SetDeadline(time.Now().Add(limit(time.Second)))
	if _, err = ln.Accept(); err != nil {
		fmt.Println(err)
	} else {
		fmt.Println("kept")
	}
	c.Close()
}

// Out of descriptors, Accept fails with EMFILE, unchanged, and nothing is lost:
// what is queued is served as soon as there are descriptors again, also what a
// member left that closed meanwhile.
func TestOutOfDescriptors(t *testing.T) {
	needKeptQueue(t)
	inModes(t, func(t *testing.T, m mode) {
		require.Equal(t, "ok\n", runWorker(t, "outOfDescriptors", "LBLISTEN_TEST_MODE="+m.name))
	})
}

func outOfDescriptorsWorker() {
	opt := WithDispatcher()
	if os.Getenv("LBLISTEN_TEST_MODE") == "kernel" {
		opt = WithRequireKernel()
	}
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opt)
	must(err)
	ls := g.Listeners()
	const clients = 24
	for range clients {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	waiting := make(chan error)
	must(ls[1].Close()) // this one finds a descriptor to wait with

	files := useUpDescriptors()
	must(ls[2].Close()) // this one doesn't
	for range 3 {
		if c, err := ls[0].Accept(); !errors.Is(err, unix.EMFILE) || c != nil {
			panic(fmt.Sprintf("Accept returned %v, want EMFILE", err))
		} else if _, ok := err.(*net.OpError); !ok {
			panic(fmt.Sprintf("Accept returned a %T", err))
		}
	}
	if _, err := Listen("tcp", "127.0.0.1:0", opt); !errors.Is(err, unix.EMFILE) {
		panic(fmt.Sprintf("Listen returned %v, want EMFILE", err))
	}
	for _, f := range files {
		f.Close()
	}
	go func() {
		for range clients {
			if _, err := ls[0].Accept(); err != nil {
				waiting <- err
			}
		}
		close(waiting)
	}()
	select {
	case err := <-waiting:
		must(err)
	case <-time.After(limit(10 * time.Second)):
		panic(fmt.Sprintf("%d of %d are not served: %+v", clients-int(ls[0].Stats().Accepted), clients, g.Stats()))
	}
	must(g.Close())
	fmt.Println("ok")
}

// Without descriptors nobody spins: loops that pause after an error, as
// http.Server's do, use no more CPU time than the pauses let them, and what
// waited meanwhile is served by them afterwards.
func TestNobodySpinsWithoutDescriptors(t *testing.T) {
	beside(t)
	needKeptQueue(t)
	inModes(t, func(t *testing.T, m mode) {
		t.Log(strings.TrimSpace(runWorker(t, "busyWithoutDescriptors", "LBLISTEN_TEST_MODE="+m.name, "GORACE=atexit_sleep_ms=0")))
	})
}

func busyWithoutDescriptorsWorker() {
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, faultOptions(os.Getenv("LBLISTEN_TEST_MODE"))...)
	must(err)
	ls := g.Listeners()
	const clients = 24
	for range clients {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	must(ls[3].Close()) // what it had is a shared socket's
	files := useUpDescriptors()
	var wg sync.WaitGroup
	var failed, accepted atomic.Int64
	const pause = 20 * time.Millisecond
	for _, l := range ls[:3] {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				_, err := l.Accept()
				switch {
				case errors.Is(err, net.ErrClosed):
					return
				case err == nil:
					accepted.Add(1)
					continue
				case !errors.Is(err, unix.EMFILE):
					panic(err)
				}
				failed.Add(1)
				time.Sleep(pause)
			}
		}()
	}
	var before, after unix.Rusage
	must(unix.Getrusage(unix.RUSAGE_SELF, &before))
	begin := time.Now()
	time.Sleep(500 * time.Millisecond)
	must(unix.Getrusage(unix.RUSAGE_SELF, &after))
	took := time.Since(begin)
	used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	errs := failed.Load()
	if errs == 0 || errs > 3*(int64(took/pause)+2) || accepted.Load() != 0 || used > took/2 {
		panic(fmt.Sprintf("%d errors, %d accepted, %v of CPU in %v", errs, accepted.Load(), used, took))
	}
	for _, f := range files {
		f.Close()
	}
	for begin := time.Now(); accepted.Load() < clients; time.Sleep(time.Millisecond) {
		if time.Since(begin) > limit(10*time.Second) {
			panic(fmt.Sprintf("%d of %d are served: %+v", accepted.Load(), clients, g.Stats()))
		}
	}
	must(g.Close())
	wg.Wait()
	fmt.Printf("%d tried, %d lost; %d errors and %v of CPU time in %v without descriptors\n",
		clients, clients-accepted.Load(), errs, used.Round(time.Millisecond), took.Round(time.Millisecond))
}

// A process that is stopped, without a handoff, loses nothing: what is in its
// queues is served when it goes on, and what is in the others' at once.
func TestStoppedProcess(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		stopped, _, address := startWorker(t, "faultServer", "LBLISTEN_TEST_OPTIONS="+m.name, "LBLISTEN_TEST_ADDRESS=127.0.0.1:0")
		if m.name == "kernel" { // the dispatcher is for one process
			startWorker(t, "faultServer", "LBLISTEN_TEST_OPTIONS="+m.name, "LBLISTEN_TEST_ADDRESS="+address)
		}
		var conns []net.Conn
		n := 0
		for range 3 {
			require.NoError(t, stopped.Process.Signal(syscall.SIGSTOP))
			conns = append(conns, standing(t, address, queued(count(200, 20), 1))...)
			n = len(conns)
			require.NoError(t, stopped.Process.Signal(syscall.SIGCONT))
		}
		served := answered(conns)
		t.Logf("%d tried, %d lost", n, n-served)
		require.Equal(t, n, served)
		for _, c := range conns {
			c.Close()
		}
	})
}

// faultServerWorker listens and echoes, with the options and at the address that it is
// told, and ends with its standard input.
func faultServerWorker() {
	g, err := ListenGroup(context.Background(), "tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), 2, faultOptions(os.Getenv("LBLISTEN_TEST_OPTIONS"))...)
	must(err)
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range g.Listeners() {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	fmt.Println(g.Addr())
	io.Copy(io.Discard, os.Stdin)
	must(g.Close())
	wg.Wait()
}
