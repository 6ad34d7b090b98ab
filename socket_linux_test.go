package lblisten

// Sockets that can't be opened, and a flood of SYNs.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// tellsQueues is whether the kernel tells how many connections are queued in a socket, asked
// of one that package net has made, with a connection in it.
var tellsQueues = sync.OnceValue(func() bool {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	check(err)
	defer client.Close()
	c, err := ln.(*net.TCPListener).SyscallConn()
	check(err)
	told := func() bool {
		var info *unix.TCPInfo
		check(onFD(c, func(fd uintptr) (err error) {
			info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			return err
		}))
		return info.Unacked == 1
	}
	for begin := time.Now(); !told(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > limit(200*time.Millisecond) {
			return false
		}
	}
	return true
})

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
