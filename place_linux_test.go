package lblisten

// Addresses of other users, and one that goes.

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Another user's process can't join the group of an address, specific or not.
func TestOtherUsersCannotJoin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("being two users takes root")
	}
	noLeaks(t)
	self := executable(t)
	for _, address := range []string{"127.0.0.1:0", ":0"} {
		ln, err := Listen("tcp", address, WithRequireKernel())
		require.NoError(t, err)
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=joinThere", "LBLISTEN_TEST_ADDRESS="+ln.Addr().String(), "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, "address in use", strings.TrimSpace(string(out)))
		require.NoError(t, ln.Close())
	}
}

func joinThereWorker() {
	ln, err := Listen("tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), WithLB())
	switch {
	case err == nil:
		os.Stdout.WriteString("it joined " + ln.Addr().String())
	case isAddrInUse(err):
		os.Stdout.WriteString("address in use")
	default:
		os.Stdout.WriteString(err.Error())
	}
}

// An address that is taken away while somebody listens on it, and comes back,
// loses nothing: what is queued is served, also when a member closes meanwhile, and
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

// bindTo is a ListenConfig for one device.
func bindTo(device string) net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return onFD(c, func(fd uintptr) error { return unix.BindToDevice(int(fd), device) })
	}}
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("ip")
	if err != nil {
		t.Skip("iproute2 is not installed")
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Skipf("ip %v: %s", args, out)
	}
}

// Listeners of one address that are bound to two devices are strangers: none is served
// by the other, also when one is closed, and a device that is made again is another.
func TestDevicesAreStrangers(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	ip(t, "link", "add", "blue", "type", "veth", "peer", "name", "eulb")
	ip(t, "link", "set", "blue", "up")
	inModes(t, func(t *testing.T, m mode) {
		const address = "0.0.0.0:20179"
		open := func(device string) *Listener {
			l, err := ListenContext(context.Background(), "tcp4", address, m.opt, WithListenConfig(bindTo(device)))
			require.NoError(t, err)
			t.Cleanup(func() { l.Close() })
			return l.(*Listener)
		}
		lo, blue := open("lo"), open("blue")
		require.Equal(t, 2, openAddresses())
		dial := func() error {
			c, err := dialOnce("tcp4", "127.0.0.1:20179") // comes in by lo
			if err == nil {
				c.Close()
			}
			return err
		}
		for range 20 {
			require.NoError(t, dial())
			acceptWithin(t, lo)
		}
		require.Zero(t, blue.Stats().Queued)
		require.NoError(t, lo.Close())
		require.ErrorIs(t, dial(), unix.ECONNREFUSED)
		lo = open("lo")
		require.NoError(t, dial())
		acceptWithin(t, lo)
		require.Equal(t, 1, lo.Info().Members)

		// Both stay open over it.
		ip(t, "link", "delete", "blue")
		ip(t, "link", "add", "blue", "type", "veth", "peer", "name", "eulb")
		again := open("blue")
		require.Equal(t, 3, openAddresses())
		require.NoError(t, blue.Close())
		require.Equal(t, 1, again.Info().Members)
		require.Zero(t, again.Stats().Inherited)
		require.NoError(t, again.Close())
		require.NoError(t, lo.Close())
	})
}

// inNetwork runs f in a network namespace of its own, as programs do that have a
// thread in each.
func inNetwork(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		check(unix.Unshare(unix.CLONE_NEWNET))
		setAddress(t, "lo", nil, unix.IFF_UP)
		f()
	}()
	<-done
}

// Two network namespaces of one process are strangers: each address serves its own,
// steers by itself, and its Info is about its own namespace.
func TestNamespacesAreStrangers(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	noLeaks(t)
	for _, opts := range [][]Option{{WithLB()}, {WithDispatcher()}, {WithSteering(SteerSource)}} {
		_, here := newTestGroup(t, 2, "tcp4", "127.0.0.1:0", opts...)
		address := here[0].Addr().String()
		ask := func(l *Listener) {
			for range 10 {
				c, err := net.Dial("tcp4", address) // in this thread's namespace
				require.NoError(t, err)
				c.Close()
				acceptWithin(t, l)
			}
		}
		require.NoError(t, here[1].Close())
		inNetwork(t, func() {
			there, err := Listen("tcp4", address, opts...)
			require.NoError(t, err)
			l := there.(*Listener)
			require.Equal(t, 1, l.Info().Members)
			require.Zero(t, l.Info().OnClose)
			ask(l)
			require.Equal(t, here[0].Info().Steering, l.Info().Steering)
			require.NotContains(t, l.Info().Reason.Error(), "another process")
			require.Zero(t, l.Stats().Inherited)
			require.NoError(t, l.Close())
			_, err = net.Dial("tcp4", address)
			require.ErrorIs(t, err, unix.ECONNREFUSED)
		})
		ask(here[0])
		require.NotContains(t, here[0].Info().Reason.Error(), "another process")
		require.NoError(t, here[0].Close())
	}
}

// What Control does to IPV6_V6ONLY decides which place a wildcard is.
func TestV6OnlyBelongsToThePlace(t *testing.T) {
	endpoints[3].need(t)
	inModes(t, func(t *testing.T, m mode) {
		_, both := newTestGroup(t, 1, "tcp", ":0", m.opt)
		only := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			return onFD(c, func(fd uintptr) error { return unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) })
		}}
		_, port, err := net.SplitHostPort(both[0].Addr().String())
		require.NoError(t, err)
		require.NoError(t, both[0].Close())
		six, err := Listen("tcp", ":"+port, m.opt, WithListenConfig(only))
		require.NoError(t, err)
		defer six.Close()
		joined := joinTest(t, six, m.opt, WithListenConfig(only))
		require.Equal(t, 2, joined.Info().Members)
		_, err = dialOnce("tcp4", "127.0.0.1:"+port)
		require.ErrorIs(t, err, unix.ECONNREFUSED)
		four, err := Listen("tcp4", "0.0.0.0:"+port, m.opt)
		require.NoError(t, err)
		require.Equal(t, 2, openAddresses())
		require.NoError(t, four.Close())
		require.NoError(t, joined.Close())
	})
}

// sock_diag tells of sockets of the same address that aren't of the same group: of
// another device, or IPV6_V6ONLY.
func TestDiagTellsStrangersApart(t *testing.T) {
	message := func(device uint32, only byte) []byte {
		m := make([]byte, 72+8)
		binary.BigEndian.PutUint16(m[4:], 80)
		binary.NativeEndian.PutUint32(m[40:], device)
		binary.NativeEndian.PutUint32(m[68:], 7)
		binary.NativeEndian.PutUint16(m[72:], 5)
		binary.NativeEndian.PutUint16(m[74:], 11)
		m[76] = only
		return m
	}
	for _, c := range []struct {
		at     place
		device uint32
		only   byte
		is     bool
	}{
		{place{network: "tcp", host: "::", port: 80}, 0, 0, true},
		{place{network: "tcp", host: "::", port: 80}, 0, 1, false},
		{place{network: "tcp6", host: "::", port: 80}, 0, 1, true},
		{place{network: "tcp6", host: "::", port: 80}, 0, 0, false},
		{place{network: "tcp6", host: "::", port: 80, device: 3}, 0, 1, false},
		{place{network: "tcp6", host: "::", port: 80, device: 3}, 3, 1, true},
		{place{network: "tcp4", host: "0.0.0.0", port: 80}, 0, 0, true},
		{place{network: "tcp4", host: "0.0.0.0", port: 80}, 2, 0, false},
		{place{network: "tcp4", host: "0.0.0.0", port: 81}, 0, 0, false},
		{place{network: "tcp4", host: "127.0.0.1", port: 80}, 0, 0, false},
	} {
		ino, is := diagInode(message(c.device, c.only), c.at)
		require.Equal(t, c.is, is, "%+v", c)
		require.Equal(t, map[bool]uint32{true: 7}[is], ino)
	}
	_, is := diagInode(make([]byte, 71), place{})
	require.False(t, is)
	for _, attrs := range [][]byte{{}, {1}, {4, 0, 11, 0}, {200, 0, 11, 0, 1}, {0, 0, 11, 0, 1}} {
		require.False(t, isDiagOnly(attrs))
	}
}

// However the members of an IPv6 address were asked for, all their sockets have one
// IPV6_V6ONLY, and so are one group of the kernel's.
func TestSocketsOfAPlaceAgreeOnV6Only(t *testing.T) {
	endpoints[1].need(t)
	modes[0].need(t)
	noLeaks(t)
	set := func(only int) Option {
		return WithListenConfig(net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			return onFD(c, func(fd uintptr) error { return unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only) })
		}})
	}
	asIs := WithLB()
	for _, c := range []struct {
		host, first string
		firstOpt    Option
		later       string
		laterOpt    Option
	}{
		{"::", "tcp", set(1), "tcp6", asIs},
		{"::", "tcp6", set(0), "tcp", asIs},
		{"::", "tcp6", asIs, "tcp", set(1)},
		{"::", "tcp", asIs, "tcp6", set(0)},
		{"::1", "tcp", asIs, "tcp6", asIs},
		{"::1", "tcp6", asIs, "tcp", asIs},
		{"::1", "tcp", set(1), "tcp", asIs},
	} {
		a, err := Listen(c.first, "["+c.host+"]:0", WithRequireKernel(), c.firstOpt)
		require.NoError(t, err)
		_, port, err := net.SplitHostPort(a.Addr().String())
		require.NoError(t, err)
		b, err := Listen(c.later, "["+c.host+"]:"+port, WithRequireKernel(), c.laterOpt)
		require.NoError(t, err, "%+v", c)
		ls := []*Listener{a.(*Listener), b.(*Listener)}
		require.Equal(t, 2, ls[0].Info().Members, "%+v", c)
		var only []bool
		for _, l := range ls {
			require.NoError(t, onDescriptor(l, func(fd int) error { only = append(only, isV6Only(uintptr(fd))); return nil }))
		}
		require.Equal(t, only[0], only[1], "%+v", c)
		got := [2]int{}
		for got[0] == 0 || got[1] == 0 { // both get some
			dialTest(t, &net.TCPAddr{IP: net.IPv6loopback, Port: a.Addr().(*net.TCPAddr).Port})
			require.Less(t, got[0]+got[1], 200)
			for i, l := range ls {
				if c, err := acceptBy(l, 2*time.Millisecond); err == nil {
					c.Close()
					got[i]++
				}
			}
		}
		for _, l := range ls {
			require.NoError(t, l.Close())
		}
	}
}
