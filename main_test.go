package lblisten

// What all tests use: the modes that they run in, listeners, clients that count,
// and the check that nothing is leaked.

import (
	"context"
	"errors"
	"fmt"
	"io"
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

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// count is n on a usual machine, less on a slow one, and at least least.
func count(n, least int) int { return max(least, int(float64(n)/slow)) }

func TestMain(m *testing.M) {
	if name := os.Getenv("LBLISTEN_TEST_WORKER"); name != "" {
		workers[name]()
		os.Exit(0)
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

var modes = []mode{{"kernel", WithRequireKernel()}, {"dispatcher", WithDispatcher()}}

// inModes runs a test with the kernel and with the dispatcher.
func inModes(t *testing.T, f func(t *testing.T, m mode)) {
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			m.need(t)
			noLeaks(t)
			f(t, m)
		})
	}
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

// An endpoint is an address to listen on and one to dial it by.
type endpoint struct{ name, network, listen, dial string }

var endpoints = []endpoint{
	{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
	{"IPv6", "tcp6", "[::1]:0", "::1"},
	{"dual stack by IPv4", "tcp", ":0", "127.0.0.1"},
	{"dual stack by IPv6", "tcp", ":0", "::1"},
}

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
		if at, _, err := resolve(context.Background(), "tcp", ":0"); err == nil && at.network != "tcp" {
			t.Skipf("no dual-stack sockets on %s", runtime.GOOS)
		}
	}
}

// of returns the address to dial a listener by.
func (e endpoint) of(a net.Addr) string {
	return net.JoinHostPort(e.dial, strconv.Itoa(a.(*net.TCPAddr).Port))
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

// dialTest connects to a; the connection is reset when the test ends.
func dialTest(t testing.TB, a net.Addr) net.Conn {
	t.Helper()
	c, err := dialOnce(a.Network(), dialable(a))
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// dialable is an address to dial a listener's address by.
func dialable(a net.Addr) string {
	if tcp, ok := a.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", strconv.Itoa(tcp.Port))
	}
	return a.String()
}

// dialOnce connects; closing the connection resets it, so that no port is kept
// busy by TIME_WAIT.
func dialOnce(network, address string) (net.Conn, error) {
	c, err := net.DialTimeout(network, address, limit(10*time.Second))
	if err != nil {
		return nil, err
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	return c, nil
}

// queueUp connects n clients, each of which sends its number.
func queueUp(t testing.TB, a net.Addr, n int) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = dialTest(t, a)
		_, err := fmt.Fprintf(conns[i], "%d\n", i)
		require.NoError(t, err)
	}
	return conns
}

// answer reads the number of a client that queueUp made and sends it back.
func answer(t testing.TB, c net.Conn) int {
	t.Helper()
	c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
	var n int
	_, err := fmt.Fscanf(c, "%d\n", &n)
	require.NoError(t, err)
	_, err = fmt.Fprintf(c, "%d\n", n)
	require.NoError(t, err)
	return n
}

// wantAnswer reads what answer sent.
func wantAnswer(t testing.TB, c net.Conn, want int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(limit(5 * time.Second)))
	var n int
	_, err := fmt.Fscanf(c, "%d\n", &n)
	require.NoError(t, err)
	require.Equal(t, want, n)
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

// echo accepts until the listener is closed, sends the first byte of each
// connection back, and closes it when its client does.
func echo(wg *sync.WaitGroup, l net.Listener, accepted *atomic.Int64) {
	defer wg.Done()
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			panic(fmt.Sprintf("accept: %v", err))
		}
		accepted.Add(1)
		wg.Add(1)
		go func() {
			defer wg.Done()
			echoConn(c)
		}()
	}
}

// echoConn sends the first byte of a connection back, and closes it when its
// client does.
func echoConn(c net.Conn) {
	defer c.Close()
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err == nil {
		c.Write(b[:])
		io.Copy(io.Discard, c)
	}
}

// answered counts the clients that get an answer.
func answered(conns []net.Conn) int {
	var n atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(limit(20 * time.Second))
	for _, c := range conns {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c.SetDeadline(deadline)
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err == nil {
				n.Add(1)
			}
		}()
	}
	wg.Wait()
	return int(n.Load())
}

// load dials from several goroutines; each client sends a byte and waits for it
// to come back.
type load struct {
	served, refused, failed atomic.Int64
	firstErr                atomic.Pointer[error]
	stop                    atomic.Bool
	wg                      sync.WaitGroup
}

func startLoad(clients int, network, address string) *load {
	d := new(load)
	for range clients {
		d.wg.Add(1)
		go func() {
			defer d.wg.Done()
			for !d.stop.Load() {
				d.one(network, address)
			}
		}()
	}
	return d
}

func (d *load) one(network, address string) {
	c, err := dialOnce(network, address)
	if isRefused(err) {
		d.refused.Add(1)
	}
	if err == nil {
		c.SetDeadline(time.Now().Add(limit(10 * time.Second)))
		b := [1]byte{'x'}
		if _, err = c.Write(b[:]); err == nil {
			_, err = io.ReadFull(c, b[:])
		}
		c.Close()
	}
	if err != nil {
		d.failed.Add(1)
		err = fmt.Errorf("after %d: %w", d.served.Load(), err)
		d.firstErr.CompareAndSwap(nil, &err)
		return
	}
	d.served.Add(1)
}

// end stops the load and fails the test for every client that was not served.
// FreeBSD refuses the connections of the instant in which a further socket is
// opened; with opening, exactly those are allowed there.
func (d *load) end(t testing.TB, opening bool) {
	t.Helper()
	d.stop.Store(true)
	d.wg.Wait()
	failed, refused := d.failed.Load(), d.refused.Load()
	t.Logf("%d tried, %d lost, %d refused", d.served.Load()+failed, failed-refused, refused)
	if opening && runtime.GOOS == "freebsd" {
		failed -= refused
	}
	if failed != 0 {
		t.Fatalf("%d clients were not served, %d of them refused; the first: %v", failed, refused, *d.firstErr.Load())
	}
	require.NotZero(t, d.served.Load())
}

// text is an error's text with the port cut out, to compare with another's.
func text(err error, a net.Addr) string {
	if err == nil {
		return "<nil>"
	}
	return strings.ReplaceAll(err.Error(), a.String(), "ADDRESS")
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
