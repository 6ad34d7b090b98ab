package lblisten

// What steering asks of the kernel, counted; and what it leaves alone.

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A classic program is attached once and never replaced while nothing grows, by flow
// there is none, and an ordinary user's process never calls bpf(2). Counted by strace.
func TestProgramsAreAttachedOnce(t *testing.T) {
	beside(t)
	if os.Geteuid() != 0 {
		t.Skip("tracing another user's process takes root")
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	if out, err := exec.Command(strace, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace does not run here: %s", out)
	}
	self := executable(t)
	for what, attaches := range map[string]int{"source": 1, "flow": 0, "churn": 2} {
		t.Run(what, func(t *testing.T) {
			beside(t)
			trace := filepath.Join(filepath.Dir(self), what)
			cmd := exec.Command(strace, "-f", "-e", "trace=setsockopt,bpf", "-o", trace, self)
			cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=attach", "LBLISTEN_TEST_ATTACH="+what, "GORACE=atexit_sleep_ms=0")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			b, err := os.ReadFile(trace)
			require.NoError(t, err)
			require.Contains(t, string(b), "SO_REUSEPORT", "nothing was traced")
			require.Equal(t, attaches, strings.Count(string(b), "SO_ATTACH_REUSEPORT_CBPF"))
			require.Zero(t, strings.Count(string(b), "SO_ATTACH_REUSEPORT_EBPF"))
			require.LessOrEqual(t, strings.Count(string(b), "SO_DETACH_REUSEPORT"), min(attaches, 1), "whether the kernel has programs is tried once, on a socket of no address")
			require.Zero(t, strings.Count(string(b), "bpf("))
		})
	}
}

func attachWorker() {
	what := os.Getenv("LBLISTEN_TEST_ATTACH")
	s := SteerSource
	if what == "flow" {
		s = SteerFlow
	}
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, WithSteering(s))
	check(err)
	switch what {
	case "flow":
		check(g.Listeners()[0].Close())
	case "churn": // the first one that joins grows, the others adopt
		for range 20 {
			l, err := Listen("tcp", g.Addr().String(), WithSteering(s))
			check(err)
			check(l.Close())
		}
	}
	time.Sleep(limit(5*lookEvery + lookEvery/2))
	if i := g.Info(); i.Steering != s {
		panic(i.String())
	}
	check(g.Close())
}

// Under a filter that kills a process for bpf(2), as systemd's
// SystemCallFilter=@system-service does, an ordinary user listens in every mode.
func TestKilledForBPF(t *testing.T) {
	beside(t)
	var said []string
	sandbox{name: "filtered", uid: nobody}.run(t, "killedForBPF", &said)
	require.Len(t, said, 5, "%v", said)
}

func killedForBPFWorker() {
	filterCall(unix.SYS_BPF, 0, unix.SECCOMP_RET_KILL_PROCESS, unix.SECCOMP_FILTER_FLAG_TSYNC)
	dir, err := os.MkdirTemp("", "lb")
	check(err)
	defer os.RemoveAll(dir)
	var said []string
	for _, opt := range []Option{WithLB(), WithDispatcher(), WithSteering(SteerSource), WithSteering(SteerCPU), WithHandoff(filepath.Join(dir, "s"))} {
		g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opt)
		if errors.Is(err, ErrUnsupported) { // an older kernel
			said = append(said, err.Error())
			continue
		}
		check(err)
		check(g.Listeners()[0].Close())
		time.Sleep(limit(lookEvery + lookEvery/4))
		said = append(said, g.Info().String())
		check(g.Close())
	}
	check(json.NewEncoder(os.Stdout).Encode(said))
}

// A classic program that a process leaves on the group doesn't starve the next one,
// however the process ends, or stands still.
func TestLeftProgramStarvesNobody(t *testing.T) {
	beside(t)
	for _, end := range []string{"close", "kill", "stop"} {
		t.Run(end, func(t *testing.T) {
			beside(t)
			var got []int
			sandbox{name: end, uid: nobody}.run(t, "leftProgram", &got, "LBLISTEN_TEST_END="+end)
			t.Logf("%v", got)
			for _, n := range got {
				require.NotZero(t, n, "%v", got)
			}
		})
	}
}

// leftProgramWorker counts what each of eight members gets after a process that
// steered by source has ended.
func leftProgramWorker() {
	if address := os.Getenv("LBLISTEN_TEST_ADDRESS"); address != "" { // the one that ends
		g, err := ListenGroup(context.Background(), "tcp4", address, 3, WithSteering(SteerSource))
		check(err)
		check(json.NewEncoder(os.Stdout).Encode(g.Addr().String()))
		os.Stdin.Read(make([]byte, 1))
		check(g.Close())
		return
	}
	self, err := os.Executable()
	check(err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=leftProgram", "LBLISTEN_TEST_ADDRESS=127.0.0.1:0")
	in, err := cmd.StdinPipe()
	check(err)
	out, err := cmd.StdoutPipe()
	check(err)
	check(cmd.Start())
	var address string
	check(json.NewDecoder(out).Decode(&address))
	g, err := ListenGroup(context.Background(), "tcp4", address, 8, WithLB())
	check(err)
	switch os.Getenv("LBLISTEN_TEST_END") {
	case "close":
		in.Close()
		cmd.Wait()
	case "kill":
		check(cmd.Process.Kill())
		cmd.Wait()
	case "stop":
		check(cmd.Process.Signal(syscall.SIGSTOP))
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
	}
	got := make([]atomic.Int64, 8)
	for i, l := range g.Listeners() {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				got[i].Add(1)
				c.Close()
			}
		}()
	}
	for range count(800, 200) {
		c, err := dialOnce("tcp4", address)
		check(err)
		check(c.Close())
	}
	time.Sleep(limit(100 * time.Millisecond))
	counts := make([]int, len(got))
	for i := range got {
		counts[i] = int(got[i].Load())
	}
	check(json.NewEncoder(os.Stdout).Encode(counts))
}

// toFirst attaches a classic program that gives everything to the first socket.
func toFirst(fd uintptr) error {
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	return unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &filter[0]})
}

// The user's own reuseport program stays, attached in Control or later, with CAP_BPF
// or without, whoever joins or leaves. Steering by another one is an error.
func TestUsersProgramStays(t *testing.T) {
	needPrograms(t)
	noLeaks(t)
	first := true
	own := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onFD(c, func(fd uintptr) error {
			if !first {
				return nil // past the first socket that is bound, listen would fail
			}
			return errors.Join(joinKernelGroup(fd), toFirst(fd))
		})
	}}
	for _, inControl := range []bool{true, false} {
		var opts []Option
		if first = true; inControl {
			opts = append(opts, WithListenConfig(own))
		}
		l, err := Listen("tcp4", "127.0.0.1:0", append(opts, WithLB())...)
		require.NoError(t, err)
		a := l.(*Listener)
		first = false
		b, c := joinTest(t, a, WithLB()), joinTest(t, a, WithLB())
		if !inControl {
			require.NoError(t, onDescriptor(a, func(fd int) error { return toFirst(uintptr(fd)) }))
		}
		all := func() {
			t.Helper()
			for range 20 {
				dialTest(t, a.Addr())
				acceptWithin(t, a)
			}
			require.Zero(t, b.Stats().Accepted+uint64(b.Stats().Queued))
		}
		all()
		require.NoError(t, c.Close())
		g := &Group{a: a.a, members: []*Listener{a, b}}
		lookNow(g)
		lookNow(g)
		all()
		d := joinTest(t, a, WithLB())
		all()
		if inControl {
			require.ErrorContains(t, a.Info().Reason, "Control attaches is left alone")
		}
		for _, l := range []*Listener{a, b, d} {
			require.NoError(t, l.Close())
		}
	}
	first = true
	for _, opt := range []Option{WithSteering(SteerSource), WithSteering(SteerLoad), WithPinnedProgram("/nowhere")} {
		_, err := Listen("tcp4", "127.0.0.1:0", opt, WithListenConfig(own))
		require.ErrorIs(t, err, ErrUnsupported)
		require.ErrorContains(t, err, "the address has one program")
	}
}

// A duplicate of a socket that is closed, as a File or a child between fork and exec
// has one, is nobody else's socket: steering goes on with it and begins beside it.
func TestDuplicateIsNoStranger(t *testing.T) {
	needSteering(t, WithSteering(SteerSource))
	noLeaks(t)
	g, ls := newTestGroup(t, 3, "tcp4", "127.0.0.1:0", WithSteering(SteerSource))
	file, err := ls[2].File()
	require.NoError(t, err)
	defer file.Close()
	require.NoError(t, ls[2].Close())
	retireNow(g) // with CAP_BPF its socket is closed now
	lookNow(g)
	require.Equal(t, SteerSource, g.Info().Steering)
	for _, l := range ls[:2] {
		f, err := l.File()
		require.NoError(t, err)
		defer f.Close()
	}
	require.NoError(t, g.Close())
	again, _ := newTestGroup(t, 2, "tcp4", g.Addr().String(), WithSteering(SteerSource))
	lookNow(again)
	require.Equal(t, SteerSource, again.Info().Steering)
	stranger, err := Listen("tcp4", g.Addr().String(), WithReusePort())
	require.NoError(t, err)
	lookNow(again)
	require.Equal(t, SteerFlow, again.Info().Steering, "this one is somebody else's")
	require.NoError(t, stranger.Close())
	lookNow(again)
	require.Equal(t, SteerSource, again.Info().Steering)
}

// The 1025th member that a program steers is one too many.
func TestSteeredMembersHaveALimit(t *testing.T) {
	var most unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &most))
	if most.Cur < 1100 {
		t.Skipf("%d descriptors are too few", most.Cur)
	}
	needSteering(t, WithSteering(SteerSource))
	noLeaks(t)
	g, ls := newTestGroup(t, steeredMost, "tcp4", "127.0.0.1:0", WithSteering(SteerSource))
	_, err := Listen("tcp4", g.Addr().String(), WithSteering(SteerSource))
	require.ErrorIs(t, err, ErrGroupFull)
	require.Equal(t, SteerSource, g.Info().Steering)
	require.NoError(t, ls[0].Close())
	joinTest(t, ls[1], WithSteering(SteerSource))
}

// The queues aren't looked at while nothing moves, also if one connection is stuck.
func TestSamplerSleepsBesideAStuckConnection(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp4", "127.0.0.1:0", WithSteering(SteerLoad))
	dialTest(t, g.Addr())
	require.Eventually(t, func() bool { return !sampling(g) }, limit(5*time.Second), 10*time.Millisecond)
	require.Equal(t, 1, queuedAt(ls[0]))
	waits := []<-chan result{blocked(t, ls[ownOf(ls)^1])}
	for len(waits[0]) == 0 { // until one comes to the other member, and is accepted
		dialTest(t, g.Addr())
	}
	require.NoError(t, get(t, waits[0]).err)
	require.Eventually(t, func() bool { return sampling(g) }, limit(5*time.Second), time.Millisecond)
	require.Eventually(t, func() bool { return !sampling(g) }, limit(5*time.Second), 10*time.Millisecond)
}

// ownOf returns which of two members has something queued.
func ownOf(ls []*Listener) int {
	if ownQueued(ls[0]) {
		return 0
	}
	return 1
}

// A backlog that is more than listen(2) takes is cut by the system, not wrapped.
func TestHugeBacklog(t *testing.T) {
	noLeaks(t)
	for _, n := range []int{math.MaxInt32, math.MaxInt/2 + 1, math.MaxInt} {
		ln, err := Listen("tcp", "127.0.0.1:0", WithLB(), WithBacklog(n))
		require.NoError(t, err)
		if tellsQueues() {
			require.GreaterOrEqual(t, ln.(*Listener).Stats().Backlog, 128)
		}
		require.NoError(t, ln.Close())
	}
}
