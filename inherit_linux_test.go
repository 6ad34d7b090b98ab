package lblisten

// Heirs that the kernel doesn't wake, or that can't ask it.

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A kernel that migrates a connection but doesn't wake the heir (5.14 up to the
// fix of 2026) is made here by taking the listening sockets out of the
// runtime's epoll: a blocked Accept finds the connection all the same, at its
// next look, and so does one that waits for a shared socket.
func TestHeirThatIsNotWokenLooksAgain(t *testing.T) {
	if !alone(t) { // with a look of its own, which begins now
		return
	}
	noLeaks(t)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	told := len(epolled(t, plain.Addr().(*net.TCPAddr).Port))
	require.NoError(t, plain.Close())
	if told == 0 {
		t.Skip("/proc/self/fdinfo doesn't tell what epoll waits for")
	}
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel())
	require.NoError(t, ls[1].Close())
	// Its own socket, the shared one, and a duplicate of that, by which it is waited for.
	port := g.Addr().(*net.TCPAddr).Port
	require.Eventually(t, func() bool { return len(epolled(t, port)) == 3 }, limit(5*time.Second), time.Millisecond)
	got := blocked(t, ls[0])
	for fd, ep := range epolled(t, port) {
		require.NoError(t, unix.EpollCtl(ep, unix.EPOLL_CTL_DEL, fd, nil))
	}
	require.Empty(t, epolled(t, port))

	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				pretendMigration(g)
			}
		}
	}()
	start := time.Now()
	for i := range 20 { // some for its own socket, some for the shared one
		dialTest(t, g.Addr())
		if i == 0 {
			select {
			case <-got:
				t.Fatal("the Accept was woken: this test tests nothing")
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	r := get(t, got)
	require.NoError(t, r.err)
	require.Less(t, time.Since(start), limit(3*time.Second))
	for range 19 {
		acceptWithin(t, ls[0])
	}
}

// epolled returns the descriptors of this process that listen on a port and are in
// an epoll, with that one's descriptor.
func epolled(t *testing.T, port int) map[int]int {
	t.Helper()
	in := make(map[int]int)
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); to != "anon_inode:[eventpoll]" {
			continue
		}
		ep, err := strconv.Atoi(e.Name())
		require.NoError(t, err)
		b, _ := os.ReadFile("/proc/self/fdinfo/" + e.Name())
		for _, line := range strings.Split(string(b), "\n") {
			var fd int
			if _, err := fmt.Sscanf(line, "tfd: %d", &fd); err != nil {
				continue
			}
			listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
			if err != nil || listens == 0 {
				continue
			}
			if sa, err := unix.Getsockname(fd); err == nil {
				if in4, ok := sa.(*unix.SockaddrInet4); ok && in4.Port == port {
					in[fd] = ep
				}
			}
		}
	}
	return in
}

// Where a filter forbids poll(2), eventfd2(2) and the scheduler's calls, nothing
// fails or spins, and what a closed member leaves is served all the same.
func TestWithoutPoll(t *testing.T) {
	beside(t)
	if pollCall == 0 {
		t.Skipf("which call is poll(2) on %s isn't known here", runtime.GOARCH)
	}
	for _, errno := range []string{"EPERM", "ENOSYS", "EPERM for eventfd2 only"} {
		t.Run(errno, func(t *testing.T) {
			beside(t)
			inModes(t, func(t *testing.T, m mode) {
				if m.name == "kernel" && errno != "EPERM for eventfd2 only" && !tellsQueues() {
					t.Skip("nothing tells that a connection is queued: neither poll(2) nor, on this kernel, TCP_INFO; what a closed member leaves isn't served then")
				}
				t.Log(strings.TrimSpace(runWorker(t, "withoutPoll", "LBLISTEN_TEST_OPTIONS="+m.name, "LBLISTEN_TEST_ERRNO="+errno, "GORACE=atexit_sleep_ms=0")))
			})
		})
	}
}

// pollCall is what unix.Poll calls.
var pollCall = map[string]uintptr{"amd64": 7, "arm64": unix.SYS_PPOLL, "riscv64": unix.SYS_PPOLL}[runtime.GOARCH]

func withoutPollWorker() {
	name, only, _ := strings.Cut(os.Getenv("LBLISTEN_TEST_ERRNO"), " ")
	errno := map[string]uint32{"EPERM": uint32(unix.EPERM), "ENOSYS": uint32(unix.ENOSYS)}[name]
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the runtime's own eventfd, and net's look at the system
	check(err)
	check(ln.Close())
	filterBPF("EPERM") // the kernel's migration would hide what is lost
	for _, call := range []uintptr{pollCall, unix.SYS_PPOLL, unix.SYS_EVENTFD2, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_GETAFFINITY, unix.SYS_SCHED_YIELD} {
		if only == "" || call == unix.SYS_EVENTFD2 {
			filterCall(call, 0, unix.SECCOMP_RET_ERRNO|errno, unix.SECCOMP_FILTER_FLAG_TSYNC)
		}
	}
	goroutines := runtime.NumGoroutine()
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, faultOptions(os.Getenv("LBLISTEN_TEST_OPTIONS"))...)
	check(err)
	ls := g.Listeners()
	n := count(120, 30)
	var conns []net.Conn
	connect := func(n int) {
		for range n {
			c, err := dialOnce("tcp", g.Addr().String())
			check(err)
			_, err = c.Write([]byte("x"))
			check(err)
			conns = append(conns, c)
		}
	}
	connect(n)
	check(ls[2].Close())
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range ls[:2] {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	connect(n) // some to the socket that is shared now
	begin := time.Now()
	served := answered(conns)
	took := time.Since(begin)
	cpu := func() time.Duration {
		var u unix.Rusage
		check(unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := cpu()
	time.Sleep(300 * time.Millisecond)
	used := cpu() - before
	for _, c := range conns {
		c.Close()
	}
	check(g.Close())
	wg.Wait()
	for begin := time.Now(); runtime.NumGoroutine() > goroutines; time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > limit(5*time.Second) {
			panic("a goroutine is left")
		}
	}
	fmt.Printf("%d tried, %d lost, all served within %v; %v of CPU time in 300 idle ms\n", 2*n, 2*n-served, took.Round(time.Millisecond), used.Round(time.Millisecond))
	if served != 2*n || used > 150*time.Millisecond {
		panic("")
	}
}
