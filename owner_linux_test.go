package lblisten

// The system calls of an Accept: how many, and what happens when one fails.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Accept costs 4 system calls, counted by strace on a queue that is never empty:
// accept4, getsockname, epoll_ctl, and setsockopt of TCP_NODELAY. Package net's
// costs 8, the other 4 are for keep-alive.
func TestAcceptSyscalls(t *testing.T) {
	beside(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	if out, err := exec.Command(strace, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace does not run here: %s", out)
	}
	self, err := os.Executable()
	require.NoError(t, err)
	for _, c := range []struct {
		accepter   string
		setsockopt int
	}{{"net", 5}, {"reuseport", 5}, {"kernel", 1}, {"dispatcher", 1}} {
		t.Run(c.accepter, func(t *testing.T) {
			beside(t)
			trace := filepath.Join(t.TempDir(), "trace")
			cmd := exec.Command(strace, "-f", "-o", trace, self)
			cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=acceptSyscalls", "LBLISTEN_TEST_ACCEPTER="+c.accepter,
				"GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0")
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			calls := callsBetweenMarks(t, trace)
			delete(calls, "clock_gettime") // the runtime's; a system call where the clock can't be read without, as in emulators
			t.Logf("for %d Accepts: %v", prefill, calls)
			require.Equal(t, map[string]int{"accept4": prefill, "getsockname": prefill, "epoll_ctl": prefill, "setsockopt": c.setsockopt * prefill}, calls)
		})
	}
}

// markName is a file that isn't there: looking for it marks a place in a trace.
const markName = "/lblisten-mark"

func acceptSyscallsWorker() {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	for _, a := range accepters {
		if a.name != os.Getenv("LBLISTEN_TEST_ACCEPTER") {
			continue
		}
		ln, err := a.listen()
		check(err)
		conns := make([]net.Conn, 0, 2*prefill)
		for range prefill {
			c, err := dialOnce("tcp", ln.Addr().String())
			check(err)
			conns = append(conns, c)
		}
		syscall.Access(markName, 0)
		for range prefill {
			c, err := ln.Accept()
			check(err)
			conns = append(conns, c)
		}
		syscall.Access(markName, 0)
		runtime.KeepAlive(conns)
	}
}

// callsBetweenMarks counts the system calls of the thread that made the marks in
// a trace, between them, but for those by which the runtime looks after itself.
func callsBetweenMarks(t *testing.T, trace string) map[string]int {
	t.Helper()
	f, err := os.Open(trace)
	require.NoError(t, err)
	defer f.Close()
	line := regexp.MustCompile(`^(\d+) +(?:<\.\.\. )?(\w+)(\(| resumed)`)
	own := map[string]bool{"futex": true, "mmap": true, "madvise": true, "nanosleep": true, "sched_yield": true,
		"rt_sigreturn": true, "rt_sigprocmask": true, "tgkill": true, "getpid": true, "epoll_pwait": true, "clone": true, "clone3": true}
	calls := make(map[string]int)
	marks, thread := 0, ""
	for in := bufio.NewScanner(f); in.Scan(); {
		m := line.FindStringSubmatch(in.Text())
		if m == nil || m[3] != "(" {
			continue // a signal, or the second half of a call
		}
		switch {
		case strings.Contains(in.Text(), markName):
			marks++
			thread = m[1]
		case marks == 1 && m[1] == thread && !own[m[2]]:
			calls[m[2]]++
		}
	}
	require.Equal(t, 2, marks, fmt.Sprint(calls))
	return calls
}

// When accept4(2) fails at random, each error reaches one Accept, net's own
// retries aside, and every connection is served.
func TestAcceptCallFailsAtRandom(t *testing.T) {
	needSocketCalls(t)
	needSeccompAction(t, unix.SECCOMP_RET_USER_NOTIF)
	inModes(t, func(t *testing.T, m mode) {
		out := strings.TrimSpace(runWorker(t, "acceptCallFails", "LBLISTEN_TEST_OPTIONS="+m.name, "GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0"))
		if why, ok := strings.CutPrefix(out, "unsupported: "); ok {
			t.Skip(why)
		}
		t.Log(out)
	})
}

func acceptCallFailsWorker() {
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, faultOptions(os.Getenv("LBLISTEN_TEST_OPTIONS"))...)
	check(err)
	ls := g.Listeners()
	check(ls[3].Close()) // a shared socket, where the kernel balances

	// The supervisor answers each accept4 with an error, or lets it go on.
	fd := filterCall(unix.SYS_ACCEPT4, 0, unix.SECCOMP_RET_USER_NOTIF,
		unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	returned := []syscall.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM}
	retried := []syscall.Errno{unix.ECONNABORTED, unix.EINTR} // by package net
	random := rand.New(rand.NewPCG(3, 4))
	var sound, calls atomic.Int64
	injected := make(map[syscall.Errno]int)
	var mu sync.Mutex
	go func() {
		runtime.LockOSThread()
		for {
			var notif struct {
				id         uint64
				pid, flags uint32
				data       [64]byte
			}
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&notif))); e != 0 {
				if e == unix.EINTR || e == unix.ENOENT {
					continue
				}
				check(e)
			}
			calls.Add(1)
			resp := struct {
				id    uint64
				val   int64
				err   int32
				flags uint32
			}{id: notif.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
			var errno syscall.Errno
			if all := append(returned, retried...); sound.Load() == 0 && random.IntN(2) == 0 {
				errno = all[random.IntN(len(all))]
				resp.err, resp.flags = -int32(errno), 0
			}
			_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&resp)))
			if e == 0 && errno != 0 {
				mu.Lock()
				injected[errno]++
				mu.Unlock()
			}
		}
	}()

	got := make(map[syscall.Errno]int)
	var wg sync.WaitGroup
	var accepted, bad atomic.Int64
	for _, l := range ls[:3] {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				c, err := l.Accept()
				var errno syscall.Errno
				switch {
				case err == nil:
					accepted.Add(1)
					wg.Add(1)
					go func() {
						defer wg.Done()
						echoConn(c)
					}()
				case errors.Is(err, net.ErrClosed):
					return
				case errors.As(err, &errno) && slices.Contains(returned, errno):
					mu.Lock()
					got[errno]++
					mu.Unlock()
				default:
					bad.Add(1)
				}
			}
		}()
	}
	d := startLoad(4, "tcp", g.Addr().String())
	for begin := time.Now(); d.served.Load() < int64(count(400, 40)) && time.Since(begin) < limit(10*time.Second); {
		time.Sleep(time.Millisecond)
	}
	d.stop.Store(true)
	d.wg.Wait()
	sound.Store(1)
	same := func() bool {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range returned {
			if got[e] != injected[e] {
				return false
			}
		}
		return true
	}
	for begin := time.Now(); !same(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > limit(5*time.Second) {
			panic(fmt.Sprintf("injected %v, got %v", injected, got))
		}
	}
	n := calls.Load()
	check(g.Close())
	wg.Wait()
	fmt.Printf("%d tried, %d lost; %d calls, injected %v, Accepts returned %v\n", d.served.Load(), d.failed.Load(), n, injected, got)
	if d.failed.Load() > 0 || bad.Load() > 0 || len(got) != len(returned) {
		panic(fmt.Sprintf("%d errors that weren't injected; %v", bad.Load(), d.firstErr.Load()))
	}
}
