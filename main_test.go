package lblisten

// What all tests use: the modes that they run in, listeners, Accepts that block,
// and the check that nothing is leaked. Clients are in load_test.go.

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// slow is how many times slower than a usual machine this one is, from the
// environment variable LBLISTEN_TEST_SLOW: time limits are multiplied by it,
// counts divided.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || f < 1 {
		return 1
	}
	return f
}()

// hurry is by how much counts, and the times for which tests go on, are divided with
// -short, and with the race detector. The processes that tests start have it from their parent's environment.
var hurry = 1.0

const hurryVariable, hurryMost = "LBLISTEN_TEST_SHORT", 6

// limit is the longest time that something may take.
func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// count is n on a usual machine, less on a slow one and with -short, and at least
// least.
func count(n, least int) int { return max(least, int(float64(n)/slow/hurry)) }

// races is n, or less with the race detector, for what takes many processes.
func races(n, with int) int {
	if raceDetector {
		return min(n, with)
	}
	return n
}

// size is count for what -short leaves alone: what would prove nothing if it were
// smaller, or follow from a seed no more.
func size(n, least int) int { return max(least, int(float64(n)/slow)) }

// period is for how long a test goes on that could go on for ever.
func period(d time.Duration) time.Duration { return time.Duration(float64(d) * slow / hurry) }

// besideMost is how many tests run beside each other that only wait. With the race
// detector, which makes their processes slow, there are fewer: processes of a handoff
// wait for each other for a second, and go on alone then.
var besideMost = map[bool]string{false: "12", true: "3"}[raceDetector]

// besides are the tests that have called beside.
var besides sync.Map

// beside lets a test, or a part of it, run beside others. It is for those that wait,
// for processes or for the kernel, and neither measure nor change what is all of
// the process's. Nor may they rely on close(2) to have an effect at once: a process
// that another test starts has the descriptors too, from fork to exec. What they
// leave TestMain finds: noLeaks could not tell whose it is.
func beside(t *testing.T) {
	t.Helper()
	besides.Store(t.Name(), true)
	t.Parallel()
}

// isBeside tells whether a test, or one that it is a part of, runs beside others.
func isBeside(t testing.TB) bool {
	for name := t.Name(); ; name = name[:strings.LastIndexByte(name, '/')] {
		if _, ok := besides.Load(name); ok {
			return true
		}
		if !strings.Contains(name, "/") {
			return false
		}
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	if raceDetector { // a race shows in half as many rounds, and each takes several times as long
		hurry = 2
	}
	if testing.Short() || os.Getenv(hurryVariable) != "" {
		hurry = hurryMost
		os.Setenv(hurryVariable, "1")
	}
	if name := os.Getenv("LBLISTEN_TEST_WORKER"); name != "" {
		workers[name]()
		os.Exit(0)
	}
	asked := false
	flag.Visit(func(f *flag.Flag) { asked = asked || f.Name == "test.parallel" || f.Name == "test.fuzz" })
	if !asked {
		flag.Set("test.parallel", besideMost) // they wait, and need no processor each
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // what the runtime opens for itself, it opens once
	if err == nil {
		ln.Close()
	}
	goleak.VerifyTestMain(leftovers{m})
}

// leftovers runs all tests, and fails if they leave something in the process:
// descriptors, maps of BPF in its memory, addresses. (goleak looks for goroutines after that.)
type leftovers struct{ *testing.M }

func (l leftovers) Run() int {
	descriptors, maps := openDescriptors(), mappedBPF()
	code := l.M.Run()
	if code != 0 {
		return code
	}
	var left string
	for until := time.Now().Add(limit(10 * time.Second)); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		left = ""
		if n := openDescriptors(); n > descriptors {
			left += fmt.Sprintf(" %d descriptors (%d before);", n, descriptors)
		}
		if n := mappedBPF(); n > maps {
			left += fmt.Sprintf(" %d BPF maps in memory (%d before);", n, maps)
		}
		if n := openAddresses(); n > 0 {
			left += fmt.Sprintf(" %d addresses;", n)
		}
		if left == "" {
			return code
		}
	}
	fmt.Fprintln(os.Stderr, "FAIL: the tests leave", left)
	return 1
}

// mappedBPF counts the BPF maps in this process's memory, which Linux tells.
func mappedBPF() int {
	b, _ := os.ReadFile("/proc/self/maps")
	return strings.Count(string(b), "bpf-map")
}

// noLeaks fails the test if it leaves a goroutine, a descriptor or an address.
func noLeaks(t testing.TB) {
	t.Helper()
	if isBeside(t) {
		return
	}
	ignore := goleak.IgnoreCurrent()
	fds := openDescriptors()
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			return // whatever went wrong first is what to look at
		}
		goleak.VerifyNone(t, ignore)
		require.Eventually(t, func() bool { return openDescriptors() <= fds }, limit(5*time.Second), 5*time.Millisecond,
			"%d descriptors were open before the test", fds)
		require.Zero(t, openAddresses())
	})
}

// longPast is a deadline that ends a blocked Accept at once.
var longPast = time.Unix(1, 0)

// A mode is who balances.
type mode struct {
	name string
	opt  Option
}

// need skips the test where the kernel doesn't balance.
func (m mode) need(t testing.TB) {
	t.Helper()
	if m.name != "kernel" {
		return
	}
	ln, err := Listen("tcp", "127.0.0.1:0", m.opt)
	if errors.Is(err, ErrUnsupported) {
		t.Skipf("the kernel doesn't balance here: %v", err)
	}
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}

var modes = []mode{{"kernel", WithRequireKernel()}, {"dispatcher", WithDispatcher()}}

// inModes runs a test with the kernel and with the dispatcher, beside each other if
// it runs beside others.
func inModes(t *testing.T, f func(t *testing.T, m mode)) {
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			if isBeside(t) {
				beside(t)
			}
			m.need(t)
			noLeaks(t)
			f(t, m)
		})
	}
}

// An endpoint is an address to listen on and one to dial it by.
type endpoint struct{ name, network, listen, dial string }

// need skips the test where the address family is missing.
func (e endpoint) need(t testing.TB) {
	t.Helper()
	host := e.dial
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Skipf("no %s here: %v", e.name, err)
	}
	require.NoError(t, ln.Close())
	if host == "::1" && e.network == "tcp" {
		if at, _, err := resolved("tcp", ":0"); err == nil && at.network != "tcp" {
			t.Skipf("no dual-stack sockets on %s", runtime.GOOS)
		}
	}
}

// of returns the address to dial a listener by.
func (e endpoint) of(a net.Addr) string {
	return net.JoinHostPort(e.dial, strconv.Itoa(a.(*net.TCPAddr).Port))
}

var endpoints = []endpoint{
	{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
	{"IPv6", "tcp6", "[::1]:0", "::1"},
	{"dual stack by IPv4", "tcp", ":0", "127.0.0.1"},
	{"dual stack by IPv6", "tcp", ":0", "::1"},
}

// socketPath is short enough for a unix socket on every system.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// hasUnixSockets is false on old versions of Windows, and under wine.
func hasUnixSockets(t testing.TB) bool {
	ln, err := net.Listen("unix", socketPath(t))
	if err != nil {
		t.Logf("without unix sockets: %v", err)
		return false
	}
	return ln.Close() == nil
}

// newTestGroup opens n members, which are closed when the test ends.
func newTestGroup(t testing.TB, n int, network, address string, opts ...Option) (*Group, []*Listener) {
	t.Helper()
	g, err := ListenGroup(context.Background(), network, address, n, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	return g, g.Listeners()
}

// joinTest opens one more member on the address of another.
func joinTest(t testing.TB, l net.Listener, opts ...Option) *Listener {
	t.Helper()
	m, err := Listen(l.Addr().Network(), l.Addr().String(), opts...)
	require.NoError(t, err)
	t.Cleanup(func() { m.Close() })
	return m.(*Listener)
}

// needSteering skips the test where members with these options can't be had.
func needSteering(t testing.TB, opts ...Option) {
	t.Helper()
	ln, err := Listen("tcp", "127.0.0.1:0", opts...)
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}

// acceptWithin accepts, and fails the test if that takes too long.
func acceptWithin(t testing.TB, l net.Listener) net.Conn {
	t.Helper()
	c, err := acceptBy(l, limit(5*time.Second))
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func acceptBy(l net.Listener, d time.Duration) (net.Conn, error) {
	dl := l.(interface{ SetDeadline(time.Time) error })
	dl.SetDeadline(time.Now().Add(d))
	defer dl.SetDeadline(time.Time{})
	return l.Accept()
}

// blocked starts an Accept and returns when it is in progress.
func blocked(t testing.TB, l *Listener) <-chan result {
	t.Helper()
	before := waiting(l)
	ch := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		ch <- result{c, err}
	}()
	soon(t, func() bool { return waiting(l) > before }, "no Accept waits")
	return ch
}

// soon waits for what is about to be so, and looks oftener than a ticker would.
func soon(t testing.TB, is func() bool, msgAndArgs ...any) {
	t.Helper()
	for begin, pause := time.Now(), time.Duration(0); !is(); pause = min(pause+time.Microsecond, time.Millisecond) {
		if time.Since(begin) > limit(5*time.Second) {
			require.FailNow(t, "it isn't so in time", msgAndArgs...)
		}
		time.Sleep(pause)
	}
}

type result struct {
	c   net.Conn
	err error
}

// get waits for a result.
func get(t testing.TB, ch <-chan result) result {
	t.Helper()
	select {
	case r := <-ch:
		if r.c != nil {
			t.Cleanup(func() { r.c.Close() })
		}
		return r
	case <-time.After(limit(10 * time.Second)):
		buf := make([]byte, 1<<20)
		t.Fatalf("no result of Accept\n%s", buf[:runtime.Stack(buf, true)])
		return result{}
	}
}

// text is an error's text with the port cut out, to compare with another's.
func text(err error, a net.Addr) string {
	if err == nil {
		return "<nil>"
	}
	return strings.ReplaceAll(err.Error(), a.String(), "ADDRESS")
}

// resetOnWindows: package net returns its own error then, and these tests' loops
// end at one.
const resetOnWindows = "under wine, Accept fails with WSAENOTCONN for a connection that its client has reset, also net's"
