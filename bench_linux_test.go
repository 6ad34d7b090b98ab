package lblisten

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Accept costs 4 system calls, counted by strace on a queue that is never empty:
// accept4, getsockname, epoll_ctl, and setsockopt of TCP_NODELAY. Package net's
// costs 8, the other 4 are for keep-alive.
func TestAcceptSyscalls(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	if out, err := exec.Command(strace, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace does not run here: %s", out)
	}
	noLeaks(t)
	self, err := os.Executable()
	require.NoError(t, err)
	for _, c := range []struct {
		accepter   string
		setsockopt int
	}{{"net", 5}, {"reuseport", 5}, {"kernel", 1}, {"dispatcher", 1}} {
		t.Run(c.accepter, func(t *testing.T) {
			trace := filepath.Join(t.TempDir(), "trace")
			cmd := exec.Command(strace, "-f", "-o", trace, self)
			cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=acceptSyscalls", "LBLISTEN_TEST_ACCEPTER="+c.accepter,
				"GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0")
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			calls := callsBetweenMarks(t, trace)
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
