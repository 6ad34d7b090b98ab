package lblisten

// Steering by the kernel: when a program is in force, and for whom.

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-reuseport"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

type steerResult struct {
	Err      string
	Info     map[string]string
	Strayed  int // sources that were seen at more than one member
	Used     int // members that got a connection
	Sources  int
	Accepted []int64
}

// steerWorker has clients from 32 sources of each family connect 20 times each
// to four members that steer by source.
func steerWorker() {
	var r steerResult
	g, err := ListenGroup(context.Background(), "tcp", ":0", 4, WithRequireKernel(), WithSteering(SteerSource))
	if err != nil {
		r.Err = err.Error()
		check(json.NewEncoder(os.Stdout).Encode(r))
		return
	}
	i := g.Info()
	r.Info = map[string]string{"steering": i.Steering.String(), "onkill": i.OnKill.String(), "reason": fmt.Sprint(i.Reason)}
	var mu sync.Mutex
	seen := make(map[string]map[int]bool)
	used := make(map[int]bool)
	var wg sync.WaitGroup
	for m, l := range g.Listeners() {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				src := c.RemoteAddr().(*net.TCPAddr).IP.String()
				mu.Lock()
				if seen[src] == nil {
					seen[src] = make(map[int]bool)
				}
				seen[src][m], used[m] = true, true
				mu.Unlock()
				c.Write([]byte("x"))
				c.Close()
			}
		}()
	}
	port := g.Addr().(*net.TCPAddr).Port
	for i := range 32 {
		for _, pair := range [][2]net.IP{{net.IPv4(127, 0, 1, byte(i+1)), net.IPv4(127, 0, 0, 1)}, {net.ParseIP(fmt.Sprintf("fd00::%x", i+1)), net.ParseIP("fd00::1")}} {
			for range 20 {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: pair[0]}, Timeout: 5 * time.Second}
				c, err := d.Dial("tcp", (&net.TCPAddr{IP: pair[1], Port: port}).String())
				check(err)
				_, err = c.Read(make([]byte, 1))
				check(err)
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		}
	}
	// Members come and go; a source still has one member while they don't.
	check(g.Close())
	wg.Wait()
	for _, ms := range seen {
		if len(ms) > 1 {
			r.Strayed++
		}
	}
	r.Sources, r.Used = len(seen), len(used)
	check(json.NewEncoder(os.Stdout).Encode(r))
}

// Each of 32 IPv4 and 32 IPv6 sources stays at one member, with the program that
// migrates as well as with the classic one that takes no privilege.
func TestSteerSourceByKernel(t *testing.T) {
	beside(t)
	for _, s := range []sandbox{
		{name: "root", reason: "no other process has a socket in the kernel's group"},
		{name: "no privilege", uid: nobody, reason: "a classic program steers"},
		{name: "no privilege, sysctl", uid: nobody, sysctl: true, reason: "no other process has a socket in the kernel's group"},
	} {
		t.Run(s.name, func(t *testing.T) {
			beside(t)
			for _, mptcp := range []string{"0", "2"} {
				var r steerResult
				s.run(t, "steer", &r, "GODEBUG=multipathtcp="+mptcp)
				require.Empty(t, r.Err)
				t.Logf("%+v", r)
				require.Equal(t, "source", r.Info["steering"])
				require.Equal(t, 64, r.Sources)
				require.Zero(t, r.Strayed)
				require.GreaterOrEqual(t, r.Used, 3)
				require.Equal(t, "none", r.Info["onkill"], "nobody else is there")
				if fd, err := loadProgram(migrateProgram); err == nil {
					unix.Close(fd)
					require.Contains(t, r.Info["reason"], s.reason)
				} else {
					require.Contains(t, r.Info["reason"], "a classic program steers")
				}
			}
		})
	}
}

// A socket of a stranger joins the kernel's group: the program lets go, both are
// served, and Info says so. When it has gone, the program (one with a table) is
// back. A second process that asks for steering is refused at once.
func TestProgramNeverStarvesOthers(t *testing.T) {
	if !alone(t) {
		return
	}
	needSteering(t, WithRequireKernel(), WithSteering(SteerSource))
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(SteerSource))
	var wg sync.WaitGroup
	var accepted, foreign atomic.Int64
	for _, l := range ls {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	d := new(load)
	for range 20 {
		d.one("tcp", g.Addr().String())
	}
	require.Equal(t, SteerSource, g.Info().Steering)
	require.Equal(t, 1, min(1, int(min(ls[0].Stats().Accepted, 20)+min(ls[1].Stats().Accepted, 20))))
	require.True(t, ls[0].Stats().Accepted == 0 || ls[1].Stats().Accepted == 0, "one source went to two members")

	stranger, err := reuseport.Listen("tcp", g.Addr().String())
	require.NoError(t, err)
	wg.Add(1)
	go echo(&wg, stranger, &foreign)
	require.Eventually(t, func() bool { return g.Info().Steering == SteerFlow }, limit(5*time.Second), 10*time.Millisecond)
	require.ErrorContains(t, g.Info().Reason, "starve")
	for range 200 {
		d.one("tcp", g.Addr().String())
	}
	require.NotZero(t, foreign.Load())
	require.NotZero(t, ls[0].Stats().Accepted)
	require.NotZero(t, ls[1].Stats().Accepted)
	require.NoError(t, stranger.Close())
	d.end(t, false)
	if steersByTable(g) {
		require.Eventually(t, func() bool { return g.Info().Steering == SteerSource }, limit(5*time.Second), 10*time.Millisecond)
	}
	require.NoError(t, g.Close())
	wg.Wait()

	stranger, err = reuseport.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, err = Listen("tcp", stranger.Addr().String(), WithRequireKernel(), WithSteering(SteerSource))
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "others listen")
	l, err := Listen("tcp", stranger.Addr().String(), WithLB())
	require.NoError(t, err, "without steering it shares")
	require.NoError(t, l.Close())
	require.NoError(t, stranger.Close())
}

// Steering by CPU goes to the member of the CPU that the client runs on, with
// loopback, also beside the migrating program.
func TestSteerCPU(t *testing.T) {
	needSteering(t, WithRequireKernel(), WithSteering(SteerCPU))
	if runtime.NumCPU() < 2 {
		t.Skip("one CPU")
	}
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(SteerCPU))
	require.Equal(t, SteerCPU, g.Info().Steering)
	if fd, err := loadProgram(migrateProgram); err == nil {
		unix.Close(fd)
		require.True(t, migrates(g), "the migrating program is beside it")
	}
	cpuOf := func(l *Listener) (cpu int) {
		require.NoError(t, onDescriptor(l, func(fd int) (err error) {
			cpu, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU)
			return err
		}))
		return cpu
	}
	require.NotEqual(t, cpuOf(ls[0]), cpuOf(ls[1]))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(0, &all))
	defer unix.SchedSetaffinity(0, &all)
	for range 60 {
		for _, l := range ls {
			var set unix.CPUSet
			set.Set(cpuOf(l))
			require.NoError(t, unix.SchedSetaffinity(0, &set))
			// By the system call itself: package net may move to another thread.
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			a := g.Addr().(*net.TCPAddr)
			require.NoError(t, connect(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())}))
			acceptWithin(t, l).Close()
			unix.Close(fd)
		}
	}
}

// A listener of go-reuseport, of the same user, and members of ours share an
// address. A program's result that is no place in the kernel's group is the
// kernel's hash.
func TestForeignMemberIsServed(t *testing.T) {
	noLeaks(t)
	foreign, err := reuseport.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g, ls := newTestGroup(t, 3, "tcp", foreign.Addr().String(), WithRequireKernel())
	var wg sync.WaitGroup
	var got [4]atomic.Int64
	for i, l := range append([]net.Listener{foreign}, ls[0], ls[1], ls[2]) {
		wg.Add(1)
		go echo(&wg, l, &got[i])
	}
	for _, attach := range []bool{false, true} {
		if attach {
			p := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 999}
			require.NoError(t, onDescriptor(ls[0], func(fd int) error {
				return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &p})
			}))
		}
		d := new(load)
		for range 400 {
			d.one("tcp", g.Addr().String())
		}
		d.end(t, false)
		for i := range got {
			require.Greater(t, got[i].Swap(0), int64(400/4/8), "member %d, program %v", i, attach)
		}
	}
	require.NoError(t, foreign.Close())
	require.NoError(t, g.Close())
	wg.Wait()
}

// Members join and leave while the kernel steers: nothing is lost, and one
// source is at one member of those that there are. TestUnprivileged tries it with
// a classic program.
func TestJoinAndLeaveWhileSteering(t *testing.T) {
	for _, s := range []Steering{SteerSource, SteerLoad, SteerCPU} {
		t.Run(s.String(), func(t *testing.T) {
			noLeaks(t)
			if s == SteerLoad {
				needBPF(t)
			}
			opts := []Option{WithRequireKernel(), WithSteering(s)}
			needSteering(t, opts...)
			g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", opts...)
			var wg sync.WaitGroup
			var accepted atomic.Int64
			for _, l := range ls {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
			d := startLoad(8, "tcp", g.Addr().String())
			for range count(100, 10) {
				l := joinTest(t, ls[0], opts...)
				wg.Add(1)
				go echo(&wg, l, &accepted)
				at := d.served.Load() + 10
				require.Eventually(t, func() bool { return d.served.Load() > at || d.failed.Load() > 0 }, limit(10*time.Second), time.Millisecond)
				require.NoError(t, l.Close())
			}
			d.end(t, false)
			require.Equal(t, s, g.Info().Steering)
			_, err := Listen("tcp", g.Addr().String(), WithLB())
			require.ErrorContains(t, err, "steer", "a member that asks for another steering is refused")
			require.NoError(t, g.Close())
			wg.Wait()
		})
	}
}

// canSteerByTable tells whether SteerSource is by a table here.
func canSteerByTable(t *testing.T) bool {
	needSteering(t, WithRequireKernel(), WithSteering(SteerSource))
	g, _ := newTestGroup(t, 1, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(SteerSource))
	defer g.Close()
	return steersByTable(g)
}

// Of 200 members 196 close under load: nothing is lost. Where a program steers by a
// table, a few seconds later four sockets are left. By flow, and without CAP_BPF, the
// others stay, for members that may join: nothing is attached for them, and what the
// kernel sends there is served.
func TestSurplusSocketsAreRetired(t *testing.T) {
	beside(t)
	for _, s := range []Steering{SteerFlow, SteerSource, SteerLoad} {
		t.Run(s.String(), func(t *testing.T) {
			beside(t)
			left := 200
			switch {
			case s == SteerLoad:
				needBPF(t)
				left = 4
			case s == SteerSource && canSteerByTable(t):
				left = 4
			}
			needSteering(t, WithRequireKernel(), WithSteering(s))
			g, ls := newTestGroup(t, 200, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(s))
			var wg sync.WaitGroup
			var accepted atomic.Int64
			for _, l := range ls {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
			d := startPaced(time.Millisecond, 4, "tcp", g.Addr().String())
			for _, l := range ls[2:198] {
				require.NoError(t, l.Close())
			}
			start := time.Now()
			if left == 200 {
				time.Sleep(limit(retireAfter + 2*lookEvery)) // nothing happens, and that takes time
			}
			require.Eventually(t, func() bool { return g.Info().Sockets == left }, limit(20*time.Second), 50*time.Millisecond)
			t.Logf("%d sockets are left after %v", left, time.Since(start))
			at := d.served.Load() + 40
			require.Eventually(t, func() bool { return d.served.Load() > at }, limit(5*time.Second), time.Millisecond)
			d.end(t, false)
			require.Equal(t, left, g.Info().Sockets)
			require.NoError(t, g.Close())
			wg.Wait()
		})
	}
}

// When the last Close returns, nobody listens: it waits for a socket that is being
// retired.
func TestLastCloseWaitsForRetiring(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	for i := range count(300, 30) {
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithSteering(SteerSource))
		require.NoError(t, ls[1].Close())
		done := make(chan struct{})
		go func() {
			defer close(done)
			retireNow(g)
		}()
		for g.Info().Sockets == 2 && i%2 == 0 { // the socket is about to be closed, or already is
			runtime.Gosched()
		}
		require.NoError(t, ls[0].Close())
		_, err := dialOnce("tcp", g.Addr().String())
		require.ErrorIs(t, err, unix.ECONNREFUSED)
		<-done
	}
}
