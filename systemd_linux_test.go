package lblisten

// Sockets that systemd holds, with a stand-in for it.

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/internal/standin"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// newService returns a stand-in for systemd, whose store has room for so many descriptors.
func newService(t testing.TB, most int) *standin.Service {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	s, err := standin.New(dir, most)
	require.NoError(t, err)
	t.Cleanup(func() {
		s.Close()
		os.RemoveAll(dir)
	})
	return s
}

// startKept starts a server as a process of a service.
func startKept(t testing.TB, service *standin.Service, job serverJob) *server {
	t.Helper()
	if _, err := os.Stat("/bin/sh"); err != nil {
		t.Skip("what starts the service is a script: ", err)
	}
	job.Systemd = true
	s := beginServerBy(t, service.Start, job)
	s.hear()
	require.Empty(t, s.Err)
	return s
}

// fresh gives a test a process whose environment says something, and has nothing from
// systemd yet.
func fresh(t *testing.T, env ...string) {
	t.Helper()
	for _, name := range []string{"NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE", "SYSTEMD_EXEC_PID"} {
		t.Setenv(name, "")
		os.Unsetenv(name)
	}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		os.Setenv(name, value)
	}
	forget := func() {
		systemd.mu.Lock()
		defer systemd.mu.Unlock()
		for len(systemd.all) > 0 {
			systemd.dropLocked(systemd.all[0])
		}
		systemd.read, systemd.err, systemd.failed, systemd.others = false, nil, nil, 0
	}
	forget()
	t.Cleanup(forget)
}

// answeredAll requires that all clients are answered, and ends them.
func answeredAll(t testing.TB, conns []net.Conn) {
	t.Helper()
	require.Equal(t, len(conns), answered(conns))
	for _, c := range conns {
		c.Close()
	}
}

// stale returns a port that nothing listens on, for a service that is to have it.
func stale(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

func inSystemdModes(t *testing.T, test func(t *testing.T, dispatcher bool)) {
	t.Helper()
	for _, dispatcher := range []bool{false, true} {
		t.Run(map[bool]string{false: "kernel", true: "dispatcher"}[dispatcher], func(t *testing.T) { test(t, dispatcher) })
	}
}

// The only process of a service is stopped, by closing, exit without closing and SIGKILL:
// what is queued, and what comes while no process lives, is answered by the next one.
func TestSystemdKeeps(t *testing.T) {
	beside(t)
	ends := map[string]func(s *server){
		"closed":     (*server).close,
		"killed":     (*server).kill,
		"terminated": func(s *server) { s.signal(syscall.SIGTERM); s.wait() },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			beside(t)
			inSystemdModes(t, func(t *testing.T, dispatcher bool) {
				service := newService(t, 16)
				job := serverJob{Address: stale(t), Members: 3, Dispatcher: dispatcher}
				sockets := 3
				if dispatcher {
					sockets = 1
				}
				var conns []net.Conn
				rounds := count(6, 3)
				for range rounds {
					s := startKept(t, service, job)
					require.Equal(t, InheritSystemd, s.OnKill&InheritSystemd, s.Reason)
					require.Equal(t, InheritSystemd, s.OnClose&InheritSystemd)
					require.Equal(t, sockets, s.Sockets)
					require.Len(t, service.Names(), sockets, "a restart adds none")
					conns = append(conns, standing(t, job.Address, 40)...)
					end(s)
					conns = append(conns, standing(t, job.Address, 40)...) // nobody is there
				}
				job.Accept = true
				s := startKept(t, service, job)
				answeredAll(t, conns)
				t.Logf("%d times: %d tried, 0 lost", rounds, len(conns))
				s.close()
				require.Len(t, service.Names(), sockets, "closing takes nothing out")
				service.Empty()
				soon(t, func() bool { // a child of another test has all descriptors of this process until exec
					c, err := dialOnce("tcp", job.Address)
					if err == nil {
						c.Close()
					}
					return isRefused(err)
				}, "somebody listens still")
			})
		})
	}
}

// Under load the only process is restarted, in turn by closing and by SIGKILL: whoever
// connects is answered, but those whose connection died with a process.
func TestSystemdRestartsUnderLoad(t *testing.T) {
	beside(t)
	inSystemdModes(t, func(t *testing.T, dispatcher bool) {
		service := newService(t, 16)
		job := serverJob{Address: stale(t), Members: 4, Dispatcher: dispatcher, Accept: true}
		s := startKept(t, service, job)
		d := startPaced(time.Millisecond, 4, "tcp", job.Address)
		rounds := races(count(20, 4), 6)
		for range rounds {
			time.Sleep(limit(20 * time.Millisecond))
			s.close()
			time.Sleep(limit(10 * time.Millisecond))
			s = startKept(t, service, job)
		}
		d.end(t, false)
		t.Logf("%d restarts", rounds)
	})
}

// More listeners than before, and fewer: those that are left over are served too.
func TestSystemdOtherCount(t *testing.T) {
	beside(t)
	service := newService(t, 16)
	job := serverJob{Address: stale(t)}
	var conns []net.Conn
	for _, n := range []int{2, 5, 1} {
		job.Members = n
		s := startKept(t, service, job)
		require.Equal(t, n, s.Members)
		conns = append(conns, standing(t, job.Address, 40)...)
		s.kill()
	}
	require.Len(t, service.Names(), 5)
	job.Accept = true
	s := startKept(t, service, job)
	require.Equal(t, 5, s.Sockets)
	answeredAll(t, conns)
}

// The first release asked for the dispatcher, the next one doesn't, or the other way round.
func TestSystemdOtherBalancer(t *testing.T) {
	beside(t)
	inSystemdModes(t, func(t *testing.T, dispatcher bool) {
		service := newService(t, 16)
		job := serverJob{Address: stale(t), Members: 3, Dispatcher: dispatcher}
		startKept(t, service, job).kill()
		conns := standing(t, job.Address, 40)
		job.Dispatcher, job.Accept = !dispatcher, true
		s := startKept(t, service, job)
		answeredAll(t, conns)
		require.NotZero(t, s.OnKill&InheritSystemd)
		if dispatcher {
			require.Equal(t, 1, s.Sockets)
		}
	})
}

// What a .socket unit has opened: without ReusePort=yes it is the dispatcher's, with it
// the kernel balances.
func TestSystemdActivation(t *testing.T) {
	beside(t)
	inSystemdModes(t, func(t *testing.T, dispatcher bool) {
		service := newService(t, 0)
		lc := net.ListenConfig{}
		if !dispatcher {
			lc.Control = reusePort
		}
		var addr string
		for i := range 2 {
			if i > 0 && dispatcher {
				break
			}
			ln, err := lc.Listen(context.Background(), "tcp", map[bool]string{true: "127.0.0.1:0", false: addr}[addr == ""])
			require.NoError(t, err)
			addr = ln.Addr().String()
			require.NoError(t, service.Open("example.socket", ln.(syscall.Conn)))
			ln.Close()
		}
		other, err := net.Listen("tcp", "127.0.0.1:0") // another of the unit's
		require.NoError(t, err)
		require.NoError(t, service.Open("other.socket", other.(syscall.Conn)))
		other.Close()
		conns := standing(t, addr, 20)
		var s *server
		for range 3 {
			s = startKept(t, service, serverJob{Address: addr, Members: 2})
			require.NotZero(t, s.OnKill&InheritSystemd)
			conns = append(conns, standing(t, addr, 20)...)
			if dispatcher {
				require.Equal(t, 1, s.Sockets)
			} else {
				require.Equal(t, 2, s.Sockets)
				require.Empty(t, s.Reason)
			}
			s.kill()
		}
		startKept(t, service, serverJob{Address: addr, Members: 2, Accept: true})
		answeredAll(t, conns)
		require.Empty(t, service.Names())
	})
}

// The kernel lets nobody add to the group of another user's socket, as systemd's is.
func TestSystemdOpenedAsRoot(t *testing.T) {
	beside(t)
	if os.Geteuid() != 0 {
		t.Skip("it takes root to have a socket of root")
	}
	for n, sockets := range map[int]int{1: 1, 3: 1} {
		service := newService(t, 0)
		lc := net.ListenConfig{Control: reusePort}
		ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, service.Open("example.socket", ln.(syscall.Conn)))
		require.NoError(t, ln.Close())
		require.NoError(t, os.Chmod(filepath.Dir(service.NotifySocket()), 0o755))
		path := executable(t)
		s := beginServerBy(t, func(cmd *exec.Cmd) error {
			cmd.Path, cmd.Dir = path, filepath.Dir(path)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			return service.Start(cmd)
		}, serverJob{Address: ln.Addr().String(), Members: n, Systemd: true, Accept: true})
		s.hear()
		require.Empty(t, s.Err)
		require.Equal(t, sockets, s.Sockets)
		require.NotZero(t, s.OnKill&InheritSystemd, s.Reason)
		answeredAll(t, standing(t, ln.Addr().String(), 20))
		s.close()
	}
}

// A unix socket: its file stays while no process is there, is bound anew if it was removed
// or if systemd has emptied the store, and the clients of an older file are answered.
func TestSystemdUnixSocket(t *testing.T) {
	beside(t)
	service := newService(t, 16)
	path := filepath.Join(filepath.Dir(service.NotifySocket()), "s")
	job := serverJob{Network: "unix", Address: path, Members: 2}
	start := func() *server { return startKept(t, service, job) }
	dial := func() net.Conn {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		return c
	}
	s := start()
	require.NotZero(t, s.OnKill&InheritSystemd, s.Reason)
	conns := []net.Conn{dial()}
	s.kill()
	conns = append(conns, dial())
	s = start()
	s.close()
	conns = append(conns, dial())
	require.NoError(t, os.Remove(path))
	s = start()
	conns = append(conns, dial())
	require.Len(t, service.Names(), 2)
	job.Accept = true
	s.kill()
	s = start()
	answeredAll(t, conns)
	s.kill()
	service.Empty()
	s = start()
	require.Equal(t, 1, answered([]net.Conn{dial()}))
	s.kill()
	other, err := net.Listen("unix", path+"2")
	require.NoError(t, err)
	defer other.Close()
	job.Address = path + "2"
	s = beginServerBy(t, service.Start, serverJob{Network: "unix", Address: path + "2", Systemd: true})
	s.hear()
	require.Contains(t, s.Err, "address already in use")
}

// With a handoff as well: the other process takes over at once, and neither the pool nor
// the store has a socket twice.
func TestSystemdWithHandoff(t *testing.T) {
	beside(t)
	inSystemdModes(t, func(t *testing.T, dispatcher bool) {
		services := []*standin.Service{newService(t, 16), newService(t, 16)}
		job := serverJob{Path: handoffPath(t), Address: stale(t), Members: 2, Dispatcher: dispatcher, Accept: true}
		sockets := map[bool]int{false: 4, true: 1}[dispatcher]
		all := []*server{startKept(t, services[0], job), startKept(t, services[1], job)}
		d := startPaced(2*time.Millisecond, 2, "tcp", job.Address)
		for i := range count(8, 4) {
			for _, s := range all {
				s.becomes(func(r serverReport) bool {
					return r.OnKill&(InheritHandoff|InheritSystemd) == InheritHandoff|InheritSystemd
				})
			}
			all[i%2].close()
			all[i%2] = startKept(t, services[i%2], job)
		}
		for _, s := range all {
			if !dispatcher {
				s.becomes(func(r serverReport) bool { return r.Sockets == 2 })
			}
		}
		d.end(t, false)
		for _, s := range all {
			s.kill()
		}
		conns := standing(t, job.Address, 40)
		s := startKept(t, services[0], job)
		s2 := startKept(t, services[1], job)
		answeredAll(t, conns)
		require.LessOrEqual(t, len(services[0].Names()), sockets)
		require.LessOrEqual(t, len(services[1].Names()), sockets)
		s.close()
		s2.close()
	})
}

// What no Listen asks for is taken out of the store: of a start, and after the last Close.
func TestSystemdGivesBack(t *testing.T) {
	if !alone(t) {
		return
	}
	giveBackAfter = limit(100 * time.Millisecond)
	service := newService(t, 16)
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=16")
	addr := stale(t)
	_, ls := newTestGroup(t, 2, "tcp", addr, WithSystemd())
	require.Len(t, service.Names(), 2)
	require.NoError(t, ls[0].a.close(ls))
	conns := standing(t, addr, 2)
	ln, err := Listen("tcp", addr, WithSystemd())
	require.NoError(t, err)
	require.Equal(t, 2, ln.(*Listener).Info().Sockets, "it has both again")
	var wg sync.WaitGroup
	var got atomic.Int64
	wg.Add(1)
	go echo(&wg, ln, &got)
	answeredAll(t, conns)
	time.Sleep(2 * giveBackAfter)
	require.Len(t, service.Names(), 2)
	require.NoError(t, ln.Close())
	wg.Wait()
	soon(t, func() bool { return len(service.Names()) == 0 }, "the store isn't emptied")
	_, err = dialOnce("tcp", addr)
	require.True(t, isRefused(err), "%v", err)
	systemd.mu.Lock()
	defer systemd.mu.Unlock()
	require.Empty(t, systemd.all)
}

// A listener that fails leaves nothing in the store.
func TestSystemdFailedListen(t *testing.T) {
	if !alone(t) {
		return
	}
	service := newService(t, 16)
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=16")
	other, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer other.Close()
	_, err = Listen("tcp", other.Addr().String(), WithSystemd())
	require.True(t, isAddrInUse(err), "%v", err)
	soon(t, func() bool { return len(service.Names()) == 0 }, "something is stored")
	ln, err := Listen("tcp", "127.0.0.1:0", WithSystemd())
	require.NoError(t, err)
	defer ln.Close()
	require.Empty(t, service.Names())
	require.ErrorContains(t, ln.(*Listener).Info().Reason, "the system has chosen")
	require.Zero(t, ln.(*Listener).Info().OnKill&InheritSystemd)
}

// What Info claims, and why it doesn't.
func TestSystemdInfo(t *testing.T) {
	if !alone(t) {
		return
	}
	info := func(n int) Info {
		t.Helper()
		g, err := ListenGroup(context.Background(), "tcp", stale(t), n, WithSystemd())
		require.NoError(t, err)
		defer g.Close()
		return g.Info()
	}
	not := func(n int, why string) {
		t.Helper()
		i := info(n)
		require.Zero(t, i.OnKill&InheritSystemd)
		require.Zero(t, i.OnClose&InheritSystemd)
		require.ErrorContains(t, i.Reason, why)
	}
	fresh(t)
	not(1, "NOTIFY_SOCKET isn't set")
	service := newService(t, 3)
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=3")
	i := info(3)
	require.Equal(t, InheritProcess|InheritSystemd, i.OnClose&^InheritKernel)
	require.NoError(t, i.Reason)
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=3")
	not(4, "room for 3 descriptors, and 4 are to be in it")
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket())
	not(1, "isn't known before its first restart")
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=3", "SYSTEMD_EXEC_PID=1")
	not(1, "a unit's main process")
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=3", "SYSTEMD_EXEC_PID="+strconv.Itoa(os.Getpid()))
	require.NotZero(t, info(1).OnKill&InheritSystemd)

	// Nobody reads, nobody is there, nonsense: Listen says so, and doesn't hang.
	silent, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(filepath.Dir(service.NotifySocket()), "n"), Net: "unixgram"})
	require.NoError(t, err)
	defer silent.Close()
	begin := time.Now()
	for where, why := range map[string]string{
		silent.LocalAddr().String():    "nobody has read it",
		"/nowhere":                     "no such file",
		"vsock:2:1":                    "neither a path nor",
		"@" + strings.Repeat("x", 200): "no name of a unix socket",
	} {
		fresh(t, "NOTIFY_SOCKET="+where, "FDSTORE=3")
		not(1, why)
	}
	require.Less(t, time.Since(begin), limit(5*time.Second))
	abstract, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "@lblisten-test-" + strconv.Itoa(os.Getpid()), Net: "unixgram"})
	require.NoError(t, err)
	defer abstract.Close()
	go func() {
		b, oob := make([]byte, 1000), make([]byte, 1000)
		for {
			_, n, _, _, err := abstract.ReadMsgUnix(b, oob)
			if err != nil {
				return
			}
			all, _ := unix.ParseSocketControlMessage(oob[:n])
			for _, m := range all {
				fds, _ := unix.ParseUnixRights(&m)
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
		}
	}()
	fresh(t, "NOTIFY_SOCKET="+abstract.LocalAddr().String(), "FDSTORE=3")
	require.NotZero(t, info(1).OnKill&InheritSystemd)
}

// An environment that isn't systemd's is an error, or another's affair.
func TestSystemdEnvironment(t *testing.T) {
	if !alone(t) {
		return
	}
	self := "LISTEN_PID=" + strconv.Itoa(os.Getpid())
	for _, bad := range [][]string{{"LISTEN_PID=x"}, {"LISTEN_PID=-1"}, {self, "LISTEN_FDS=garbage"}, {self, "LISTEN_FDS=0"}, {self, "LISTEN_FDS=-1"}, {self, "LISTEN_FDS=99999999999"}} {
		t.Run(fmt.Sprint(strings.Replace(strings.Join(bad, " "), self, "own", 1)), func(t *testing.T) {
			fresh(t, bad...)
			_, err := Listen("tcp", "127.0.0.1:0", WithSystemd())
			name, _, _ := strings.Cut(bad[len(bad)-1], "=")
			require.ErrorContains(t, err, "WithSystemd: "+name)
		})
	}
	for _, good := range [][]string{{}, {"LISTEN_PID=1", "LISTEN_FDS=garbage"}, {self}, {"LISTEN_FDS=5"}} {
		t.Run("good "+strconv.Itoa(len(good)), func(t *testing.T) {
			fresh(t, good...)
			ln, err := Listen("tcp", "127.0.0.1:0", WithSystemd())
			require.NoError(t, err)
			require.NoError(t, ln.Close())
		})
	}
	_, err := Listen("tcp", "127.0.0.1:0", WithSystemd(), WithReusePort())
	require.Error(t, err)
}

// Descriptors that are no listening sockets are left alone, whoever's they are, but one of
// a process of this package that died before it listened.
func TestSystemdOtherDescriptors(t *testing.T) {
	beside(t)
	service := newService(t, 16)
	file, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer file.Close()
	require.NoError(t, service.Open("file", file))
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	require.NoError(t, service.Open("udp", udp.(syscall.Conn)))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	young := os.NewFile(uintptr(fd), "young")
	defer young.Close()
	require.NoError(t, service.Open(newName(fileKey{}), young))
	s := startKept(t, service, serverJob{Address: stale(t)})
	links, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	require.NoError(t, err)
	names := make([]string, 0, len(links))
	for _, l := range links {
		names = append(names, l.Name())
	}
	require.Subset(t, names, []string{"3", "4"})
	require.NotZero(t, s.OnKill&InheritSystemd, s.Reason)
}

// A program that no systemd has started just listens.
func TestSystemdIsNotThere(t *testing.T) {
	beside(t)
	s := beginServerBy(t, (*exec.Cmd).Start, serverJob{Address: "127.0.0.1:0", Systemd: true, Accept: true})
	s.hear()
	require.Empty(t, s.Err)
	require.Equal(t, 4, s.Members)
	s.close()
}

// Steering by source goes on over a restart: one place for each socket.
func TestSystemdSteering(t *testing.T) {
	if !alone(t) {
		return
	}
	needSteering(t, WithSteering(SteerSource))
	service := newService(t, 16)
	fresh(t, "NOTIFY_SOCKET="+service.NotifySocket(), "FDSTORE=16")
	addr := stale(t)
	for range 3 {
		g, err := ListenGroup(context.Background(), "tcp", addr, 3, WithSystemd(), WithSteering(SteerSource))
		require.NoError(t, err)
		i := g.Info()
		require.Equal(t, SteerSource, i.Steering, "%v", i.Reason)
		require.Equal(t, 3, i.Sockets)
		require.NoError(t, g.Close())
	}
	require.Len(t, service.Names(), 3)
	g, err := ListenGroup(context.Background(), "tcp", addr, 3, WithSystemd()) // takes the program off
	require.NoError(t, err)
	var wg sync.WaitGroup
	var got [3]atomic.Int64
	for i, l := range g.Listeners() {
		wg.Add(1)
		go echo(&wg, l, &got[i])
	}
	answeredAll(t, standing(t, addr, 60))
	for i := range got {
		require.NotZero(t, got[i].Load())
	}
	require.NoError(t, g.Close())
	wg.Wait()
}
