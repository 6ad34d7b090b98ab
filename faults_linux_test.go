package lblisten

// Faults of the kernel and of the machine: system calls that fail, made by a
// seccomp filter; a SYN flood and an address that goes, in a network namespace;
// a full disk and one that can't be written to, in a mount namespace; another
// clock, in a time namespace. The machine itself is left alone.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
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

// filterCall has a seccomp filter do what ret says when a system call is made,
// with arg as its third argument if that isn't 0: in this thread, or by the flags
// in the whole process.
func filterCall(call uintptr, arg uint32, ret uint32, flags uintptr) (fd int) {
	low := uint32(16 + 2*8) // of struct seccomp_data
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		low += 4
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(call), Jf: 4},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: low},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: arg, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JA, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: ret},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if arg != 0 {
		filter[4].K = 1
	}
	check(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	r, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if e != 0 {
		check(e)
	}
	return int(r)
}

// needSocketCalls skips where sockets have one system call for everything.
func needSocketCalls(t *testing.T) {
	t.Helper()
	if runtime.GOARCH == "386" || runtime.GOARCH == "s390x" {
		t.Skipf("on %s all goes by socketcall(2), and a filter can't tell", runtime.GOARCH)
	}
}

// When a system call of Listen fails, Listen returns the error with the address,
// and nothing of the listener is left; the group that it was to join, and the
// handoff, go on.
func TestListenCallsFail(t *testing.T) {
	needSocketCalls(t)
	for _, opts := range []string{"kernel", "dispatcher", "kernel handoff", "dispatcher handoff"} {
		t.Run(opts, func(t *testing.T) {
			noLeaks(t)
			if o, ok := strings.CutSuffix(opts, "handoff"); ok {
				opts = o + "handoff=" + handoffPath(t)
			}
			t.Log(strings.TrimSpace(runWorker(t, "listenCallsFail", "LBLISTEN_TEST_OPTIONS="+opts, "GORACE=atexit_sleep_ms=0")))
		})
	}
}

func listenCallsFailWorker() {
	names := os.Getenv("LBLISTEN_TEST_OPTIONS")
	opts := faultOptions(names)
	dispatcher := strings.HasPrefix(names, "dispatcher")
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2, opts...)
	check(err)
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range g.Listeners() {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	d := startLoad(2, "tcp", g.Addr().String())
	_, path, _ := strings.Cut(names, "handoff=")
	pool := func() (n int) {
		eachPooled(path, func(int) { n++ })
		return n
	}
	pooled := pool()
	failed := 0
	for _, c := range []struct {
		name string
		call uintptr
		arg  uint32
	}{{"socket", unix.SYS_SOCKET, 0}, {"bind", unix.SYS_BIND, 0}, {"listen", unix.SYS_LISTEN, 0}, {"setsockopt", unix.SYS_SETSOCKOPT, 0},
		{"SO_REUSEPORT", unix.SYS_SETSOCKOPT, unix.SO_REUSEPORT}} {
		for _, errno := range []unix.Errno{unix.ENOMEM, unix.ENOBUFS, unix.EMFILE} {
			for _, address := range []string{g.Addr().String(), "127.0.0.1:0"} {
				var m *Group
				var err error
				ended := make(chan struct{})
				go func() { // its thread ends with it, and so does the filter
					defer close(ended)
					runtime.LockOSThread()
					filterCall(c.call, c.arg, unix.SECCOMP_RET_ERRNO|uint32(errno), 0)
					m, err = ListenGroup(context.Background(), "tcp", address, 2, opts...)
				}()
				<-ended
				if err == nil && dispatcher && c.call != unix.SYS_SOCKET {
					check(m.Close()) // it opens no socket, or needs no such option
					continue
				}
				failed++
				var op *net.OpError
				if m != nil || !errors.As(err, &op) || !errors.Is(err, errno) || !strings.Contains(err.Error(), "127.0.0.1:") {
					panic(fmt.Sprintf("%s, %v: %v, %v", c.name, errno, m, err))
				}
				if g.Info().Members != 2 || pool() != pooled {
					panic(fmt.Sprintf("%s, %v: %+v, a pool of %d", c.name, errno, g.Info(), pool()))
				}
			}
		}
	}
	d.stop.Store(true)
	d.wg.Wait()
	wantNoneOpen := func(what string, n func() int, most int) {
		for begin := time.Now(); n() > most; time.Sleep(time.Millisecond) {
			if time.Since(begin) > limit(10*time.Second) {
				panic(fmt.Sprintf("%d %s are open, want %d", n(), what, most))
			}
		}
	}
	sockets := 2
	if dispatcher {
		sockets = 1
	}
	wantNoneOpen("sockets", func() int { return g.Info().Sockets }, sockets)
	check(g.Close())
	wg.Wait()
	wantNoneOpen("listening sockets", func() (n int) {
		for fd := range 4096 {
			if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && on != 0 {
				n++
			}
		}
		return n
	}, 0)
	fmt.Printf("%d Listens failed beside %d tried, %d lost\n", failed, d.served.Load(), d.failed.Load())
	if d.failed.Load() > 0 || failed < 15 {
		panic(*d.firstErr.Load())
	}
}

// When accept4(2) fails at random, each error reaches one Accept, net's own
// retries aside, and every connection is served.
func TestAcceptCallFailsAtRandom(t *testing.T) {
	needSocketCalls(t)
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

// Where a filter forbids poll(2), eventfd2(2) and the scheduler's calls, nothing
// fails or spins, and what a closed member leaves is served all the same.
func TestWithoutPoll(t *testing.T) {
	if pollCall == 0 {
		t.Skipf("which call is poll(2) on %s isn't known here", runtime.GOARCH)
	}
	for _, errno := range []string{"EPERM", "ENOSYS", "EPERM for eventfd2 only"} {
		t.Run(errno, func(t *testing.T) {
			inModes(t, func(t *testing.T, m mode) {
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

// A pinned program is of no use where a filter forbids bpf(2): Listen returns an
// error that names it, and the members that have it already go on.
func TestPinnedProgramWhereBPFIsForbidden(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	path := pin(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithPinnedProgram(path))
	clients := queueUp(t, g.Addr(), 20)
	for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
		for _, address := range []string{g.Addr().String(), "127.0.0.1:0"} {
			var err error
			ended := make(chan struct{})
			go func() { // its thread ends with it, and so does the filter
				defer close(ended)
				runtime.LockOSThread()
				filterCall(unix.SYS_BPF, 0, unix.SECCOMP_RET_ERRNO|uint32(errno), 0)
				_, err = Listen("tcp", address, WithPinnedProgram(path))
			}()
			<-ended
			require.ErrorIs(t, err, errno)
			require.ErrorContains(t, err, path)
			require.ErrorContains(t, err, " 127.0.0.1:")
			require.Equal(t, 2, ls[0].Info().Members)
			require.NotZero(t, ls[0].Info().OnKill&InheritKernel)
		}
	}
	require.NoError(t, ls[1].Close())
	for range clients {
		n := answer(t, acceptWithin(t, ls[0]))
		wantAnswer(t, clients[n], n)
	}
	t.Logf("%d tried, 0 lost", len(clients))
}

// inNamespaces runs the test once more, in namespaces of its own, and returns
// true there. The kernel's migration is forbidden there, because it would hide
// what is lost.
func inNamespaces(t *testing.T, flags uintptr) bool {
	t.Helper()
	if os.Getenv("LBLISTEN_TEST_NAMESPACES") == t.Name() {
		filterBPF("EPERM")
		if flags&unix.CLONE_NEWNS != 0 {
			require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		}
		if flags&unix.CLONE_NEWNET != 0 {
			setAddress(t, "lo", nil, unix.IFF_UP)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("making namespaces takes root")
	}
	noLeaks(t)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, "-test.v", "-test.run=^"+t.Name()+"$", "-test.timeout="+limit(time.Minute).String())
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_NAMESPACES="+t.Name(), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, line := range strings.Split(string(out), "\n") {
		switch what := strings.TrimSpace(line); {
		case strings.HasPrefix(what, "--- SKIP: "+t.Name()+" "):
			t.Skipf("%s", out)
		case strings.HasPrefix(what, "faults_linux_test.go:"):
			_, said, _ := strings.Cut(what, ": ")
			t.Log(said)
		}
	}
	require.Contains(t, string(out), "--- PASS: "+t.Name()+" ", "%s", out)
	return false
}

// setAddress gives an interface an address, and flags: an alias without IFF_UP is
// taken away.
func setAddress(t *testing.T, name string, ip net.IP, flags uint16) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	require.NoError(t, err)
	if ip != nil {
		require.NoError(t, ifr.SetInet4Addr(ip.To4()))
		require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFADDR, ifr))
	}
	if ip == nil {
		ifr.SetUint16(flags)
		require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
	}
}

// An address that is taken away while somebody listens on it, and comes back,
// loses nothing: what waits is served, also when a member closes meanwhile, and
// new connections come as soon as it is there again.
func TestAddressComesAndGoes(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	ip := net.IPv4(192, 0, 2, 77)
	inModes(t, func(t *testing.T, m mode) {
		setAddress(t, "lo:7", ip, 0)
		g, ls := newTestGroup(t, 3, "tcp", "192.0.2.77:0", m.opt)
		n := count(60, 10)
		var conns []net.Conn
		for range 2 {
			conns = append(conns, queueUp(t, g.Addr(), n)...)
			setAddress(t, "lo:7", nil, 0)
			_, err := net.DialTimeout("tcp", g.Addr().String(), 50*time.Millisecond)
			require.Error(t, err, "the address is there still")
			if len(conns) == n {
				require.NoError(t, ls[2].Close())
			}
			if m.name == "kernel" {
				_, err := ListenGroup(context.Background(), "tcp", g.Addr().String(), 3, m.opt)
				require.ErrorIs(t, err, unix.EADDRNOTAVAIL)
				require.ErrorContains(t, err, g.Addr().String())
			}
			setAddress(t, "lo:7", ip, 0)
		}
		conns = append(conns, queueUp(t, g.Addr(), n)...)
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls[:2] {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		served := answered(conns)
		d := startLoad(2, "tcp", g.Addr().String())
		require.Eventually(t, func() bool { return d.served.Load() > 50 }, limit(10*time.Second), time.Millisecond)
		d.end(t, false)
		for _, c := range conns {
			c.Close()
		}
		require.NoError(t, g.Close())
		wg.Wait()
		setAddress(t, "lo:7", nil, 0)
		t.Logf("%s: while the address was gone, %d tried, %d lost", m.name, len(conns), len(conns)-served)
		require.Equal(t, len(conns), served)
	})
}

// Under a SYN flood from addresses that don't answer, with SYN cookies, every
// real connection is served.
func TestSYNFlood(t *testing.T) {
	ip, err := exec.LookPath("ip")
	if err != nil {
		t.Skip("setting a route takes ip(8)")
	}
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	// Answers to 10.0.0.0/8 go out and are dropped, so that the handshakes stay
	// half-open.
	if out, err := exec.Command(ip, "route", "add", "10.0.0.0/8", "dev", "lo").CombinedOutput(); err != nil {
		t.Skipf("ip: %s", out)
	}
	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("1"), 0))
	inModes(t, func(t *testing.T, m mode) {
		before := netstat(t, "TcpExt", "SyncookiesSent")
		g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", m.opt, WithBacklog(64))
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		d := startLoad(4, "tcp", g.Addr().String())
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		require.NoError(t, err)
		defer unix.Close(fd)
		to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
		n := count(4000, 1000)
		for i := range n {
			require.NoError(t, unix.Sendto(fd, synTo(uint32(i), uint16(g.Addr().(*net.TCPAddr).Port)), 0, to))
			if i%40 == 0 {
				time.Sleep(time.Millisecond)
			}
			if i == n/2 {
				require.NoError(t, ls[3].Close())
			}
		}
		d.end(t, false)
		require.NoError(t, g.Close())
		wg.Wait()
		cookies := netstat(t, "TcpExt", "SyncookiesSent") - before
		t.Logf("%s: %d tried, 0 lost, beside %d SYNs of the flood; the kernel sent %d cookies to both", m.name, d.served.Load(), n, cookies)
		require.NotZero(t, cookies, "the flood did nothing")
	})
}

// synTo is a SYN from an address of 10.0.0.0/8 to a port of 127.0.0.1.
func synTo(n uint32, port uint16) []byte {
	b := make([]byte, 40)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[2:], 40)
	binary.BigEndian.PutUint32(b[12:], 10<<24+1+n)
	copy(b[16:], []byte{127, 0, 0, 1})
	tcp := b[20:]
	binary.BigEndian.PutUint16(tcp, uint16(1024+n%60000))
	binary.BigEndian.PutUint16(tcp[2:], port)
	binary.BigEndian.PutUint32(tcp[4:], n*7919)
	tcp[12], tcp[13] = 5<<4, 2 // SYN
	binary.BigEndian.PutUint16(tcp[14:], 65535)
	sum := uint32(unix.IPPROTO_TCP + 20) // with the pseudo header
	for i := 12; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	return b // the kernel fills in the sum of the IP header
}

// netstat returns a counter of /proc/net/netstat.
func netstat(t *testing.T, group, name string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/net/netstat")
	require.NoError(t, err)
	var names []string
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != group+":" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		n, err := strconv.Atoi(f[slices.Index(names, name)])
		require.NoError(t, err)
		return n
	}
	t.Fatalf("no %s in /proc/net/netstat", name)
	return 0
}

// A disk that is full when the hub dies costs nothing: nobody can be the hub, so
// everybody serves everything, and when there is room again, all find together.
func TestHandoffDiskFullWhileRunning(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS|unix.CLONE_NEWNET) {
		return
	}
	for _, m := range modes {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher"}
		dir := filepath.Dir(job.Path)
		// Room for the directory, the lock and the socket, but not for another one.
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=3,mode=700"))
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		var servers []*server
		for range 3 {
			servers = append(servers, startServer(t, job))
			job.Address = servers[0].Address
		}
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		n := count(300, 30)
		conns := standing(t, job.Address, n)
		servers[0].kill()
		servers[1].becomes(func(r serverReport) bool { return strings.Contains(r.Reason, "no space left on device") })
		servers[1].ask("accept")
		served := answered(conns)
		t.Logf("%s: %d tried, %d lost", m.name, n, n-served)
		require.Equal(t, n, served)
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "nr_inodes=100,mode=700"))
		for _, s := range append(servers[1:], startServer(t, job)) {
			s.becomes(isHandedOff)
		}
		for _, c := range conns {
			c.Close()
		}
	}
}

// A process that may only read the file system of the handoff's path gets an
// error that says so, before it opens anything, and the others go on.
func TestHandoffReadOnly(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS|unix.CLONE_NEWNET) {
		return
	}
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	servers := []*server{startServer(t, job)}
	job.Address = servers[0].Address
	servers = append(servers, startServer(t, job))
	n := count(300, 30)
	conns := standing(t, job.Address, n)
	readOnly := filepath.Dir(handoffPath(t))
	require.NoError(t, unix.Mount(filepath.Dir(job.Path), readOnly, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(readOnly, unix.MNT_DETACH) })
	require.NoError(t, unix.Mount("", readOnly, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	fds := openDescriptors()
	for _, path := range []string{filepath.Join(readOnly, "lb.sock"), filepath.Join(readOnly, "new.sock")} {
		for _, opt := range []Option{WithRequireKernel(), WithDispatcher()} {
			_, err := Listen("tcp", job.Address, opt, WithHandoff(path))
			require.ErrorIs(t, err, unix.EROFS)
			require.ErrorContains(t, err, path)
			require.ErrorContains(t, err, job.Address)
		}
	}
	require.Equal(t, fds, openDescriptors())
	for _, s := range servers {
		s.becomes(isHandedOff)
	}
	servers[0].kill()
	servers[1].ask("accept")
	served := answered(conns)
	t.Logf("%d tried, %d lost", n, n-served)
	require.Equal(t, n, served)
}

// Processes whose monotonic clocks differ by ten days, as in containers that were
// moved, are one set of a handoff: nothing that goes between them is a time. (The
// clock of a running process can't be moved without the machine's: a time
// namespace is entered by exec, and the wall clock has none.)
func TestHandoffOfOtherClocks(t *testing.T) {
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("making a time namespace takes unshare(1)")
	}
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	shifted := []string{unshare, "--time", "--monotonic", "864000", "--boottime", "864000", "--fork", "--kill-child"}
	out, err := exec.Command(unshare, append(slices.Clone(shifted[1:]), "cat", "/proc/uptime")...).CombinedOutput()
	if err != nil {
		t.Skipf("no time namespace: %s", out)
	}
	var uptime float64
	_, err = fmt.Sscan(string(out), &uptime)
	require.NoError(t, err)
	require.Greater(t, uptime, 864000.0)
	for _, m := range modes {
		for _, dead := range []int{0, 1} {
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher"}
			servers := []*server{startServer(t, job)}
			job.Address = servers[0].Address
			servers = append(servers, beginServer(t, job, shifted...))
			servers[1].hear()
			for _, s := range servers {
				s.becomes(isHandedOff)
			}
			n := count(300, 30)
			conns := standing(t, job.Address, n)
			servers[dead].kill()
			servers[1-dead].ask("accept")
			served := answered(conns)
			t.Logf("%s: %d tried, %d lost", m.name, n, n-served)
			require.Equal(t, n, served)
			for _, c := range conns {
				c.Close()
			}
			servers[1-dead].close()
		}
	}
}
