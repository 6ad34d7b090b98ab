//go:build unix && !aix

package lblisten

// Faults of processes: no descriptors, stopped, killed, replaced by exec, and a
// handoff whose hub or directory goes away in the middle of something.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// faultOptions are the options of a worker, by their names.
func faultOptions(names string) []Option {
	var opts []Option
	for _, name := range strings.Fields(names) {
		what, path, _ := strings.Cut(name, "=")
		switch what {
		case "kernel":
			opts = append(opts, WithRequireKernel())
		case "dispatcher":
			opts = append(opts, WithDispatcher())
		case "source":
			opts = append(opts, WithSteering(SteerSource))
		case "cpu":
			opts = append(opts, WithSteering(SteerCPU))
		case "load":
			opts = append(opts, WithSteering(SteerLoad))
		case "handoff":
			opts = append(opts, WithHandoff(path))
		default:
			panic(name)
		}
	}
	return opts
}

// Without descriptors nobody spins: loops that pause after an error, as
// http.Server's do, use no more CPU time than the pauses let them, and what
// waited meanwhile is served by them afterwards.
func TestNobodySpinsWithoutDescriptors(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		t.Log(strings.TrimSpace(runWorker(t, "busyWithoutDescriptors", "LBLISTEN_TEST_MODE="+m.name, "GORACE=atexit_sleep_ms=0")))
	})
}

func busyWithoutDescriptorsWorker() {
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, faultOptions(os.Getenv("LBLISTEN_TEST_MODE"))...)
	must(err)
	ls := g.Listeners()
	const clients = 24
	for range clients {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	must(ls[3].Close()) // what it had is a shared socket's
	files := useUpDescriptors()
	var wg sync.WaitGroup
	var failed, accepted atomic.Int64
	const pause = 20 * time.Millisecond
	for _, l := range ls[:3] {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				_, err := l.Accept()
				switch {
				case errors.Is(err, net.ErrClosed):
					return
				case err == nil:
					accepted.Add(1)
					continue
				case !errors.Is(err, unix.EMFILE):
					panic(err)
				}
				failed.Add(1)
				time.Sleep(pause)
			}
		}()
	}
	var before, after unix.Rusage
	must(unix.Getrusage(unix.RUSAGE_SELF, &before))
	begin := time.Now()
	time.Sleep(500 * time.Millisecond)
	must(unix.Getrusage(unix.RUSAGE_SELF, &after))
	took := time.Since(begin)
	used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	errs := failed.Load()
	if errs == 0 || errs > 3*(int64(took/pause)+2) || accepted.Load() != 0 || used > took/2 {
		panic(fmt.Sprintf("%d errors, %d accepted, %v of CPU in %v", errs, accepted.Load(), used, took))
	}
	for _, f := range files {
		f.Close()
	}
	for begin := time.Now(); accepted.Load() < clients; time.Sleep(time.Millisecond) {
		if time.Since(begin) > limit(10*time.Second) {
			panic(fmt.Sprintf("%d of %d are served: %+v", accepted.Load(), clients, g.Stats()))
		}
	}
	must(g.Close())
	wg.Wait()
	fmt.Printf("%d tried, %d lost; %d errors and %v of CPU time in %v without descriptors\n",
		clients, clients-accepted.Load(), errs, used.Round(time.Millisecond), took.Round(time.Millisecond))
}

// faultServerWorker listens and echoes, with the options and at the address that it is
// told, and ends with its standard input.
func faultServerWorker() {
	g, err := ListenGroup(context.Background(), "tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), 2, faultOptions(os.Getenv("LBLISTEN_TEST_OPTIONS"))...)
	must(err)
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range g.Listeners() {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	fmt.Println(g.Addr())
	io.Copy(io.Discard, os.Stdin)
	must(g.Close())
	wg.Wait()
}

// startWorker starts a worker, and returns it, what ends it, and the first line
// that it prints.
func startWorker(t testing.TB, name string, env ...string) (cmd *exec.Cmd, end func(), line string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd = exec.Command(self)
	cmd.Env = append(append(os.Environ(), "LBLISTEN_TEST_WORKER="+name, "GORACE=atexit_sleep_ms=0"), env...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	end = sync.OnceFunc(func() {
		late := time.AfterFunc(limit(20*time.Second), func() { cmd.Process.Kill() })
		in.Close()
		require.NoError(t, cmd.Wait())
		late.Stop()
	})
	t.Cleanup(func() {
		if t.Failed() {
			cmd.Process.Kill()
			in.Close()
			cmd.Wait()
			return
		}
		end()
	})
	line, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "a worker ended")
	return cmd, end, strings.TrimSpace(line)
}

// A process that is stopped, without a handoff, loses nothing: what waits in its
// queues is served when it goes on, and what is in the others' at once.
func TestStoppedProcess(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		stopped, _, address := startWorker(t, "faultServer", "LBLISTEN_TEST_OPTIONS="+m.name, "LBLISTEN_TEST_ADDRESS=127.0.0.1:0")
		if m.name == "kernel" { // the dispatcher is for one process
			startWorker(t, "faultServer", "LBLISTEN_TEST_OPTIONS="+m.name, "LBLISTEN_TEST_ADDRESS="+address)
		}
		var conns []net.Conn
		n := 0
		for range 3 {
			require.NoError(t, stopped.Process.Signal(syscall.SIGSTOP))
			conns = append(conns, standing(t, address, count(200, 20))...)
			n = len(conns)
			require.NoError(t, stopped.Process.Signal(syscall.SIGCONT))
		}
		served := answered(conns)
		t.Logf("%d tried, %d lost", n, n-served)
		require.Equal(t, n, served)
		for _, c := range conns {
			c.Close()
		}
	})
}

// Every descriptor of the package is closed by exec: a child process has none,
// and when its parent closes, the address is free although the child lives.
func TestDescriptorsAreClosedByExec(t *testing.T) {
	for _, opts := range []string{"kernel", "dispatcher", "kernel source", "dispatcher source", "kernel cpu", "kernel load", "kernel handoff", "dispatcher handoff"} {
		t.Run(opts, func(t *testing.T) {
			noLeaks(t)
			if strings.HasPrefix(opts, "kernel") {
				modes[0].need(t)
			}
			if o, ok := strings.CutSuffix(opts, "handoff"); ok {
				opts = o + "handoff=" + handoffPath(t)
			}
			out := strings.TrimSpace(runWorker(t, "closeOnExec", "LBLISTEN_TEST_OPTIONS="+opts, "GORACE=atexit_sleep_ms=0"))
			if why, ok := strings.CutPrefix(out, "unsupported: "); ok {
				t.Skip(why)
			}
			t.Log(out)
		})
	}
}

func closeOnExecWorker() {
	names := os.Getenv("LBLISTEN_TEST_OPTIONS")
	opts := faultOptions(names)
	inherited := notClosedByExec() // from whoever runs the tests
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, opts...)
	if errors.Is(err, ErrUnsupported) || errors.Is(err, unix.EPERM) {
		fmt.Println("unsupported:", err)
		return
	}
	must(err)
	address := g.Addr().String()
	ls := g.Listeners()
	must(ls[3].Close()) // a socket that is shared, and watched
	const clients = 20
	var open []net.Conn
	for range clients {
		c, err := net.Dial("tcp", address)
		must(err)
		open = append(open, c)
	}
	for i := 0; len(open) < 2*clients; i++ {
		if c, err := acceptBy(ls[i%3], limit(20*time.Millisecond)); err == nil {
			open = append(open, c)
		}
	}
	self, err := os.Executable()
	must(err)
	if strings.Contains(names, "handoff") { // one that is killed, whose sockets come here
		other := exec.Command(self)
		other.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=faultServer", "LBLISTEN_TEST_ADDRESS="+address)
		in, err := other.StdinPipe()
		must(err)
		defer in.Close()
		out, err := other.StdoutPipe()
		must(err)
		must(other.Start())
		_, err = bufio.NewReader(out).ReadString('\n')
		must(err)
		must(other.Process.Kill())
		other.Wait()
		for begin := time.Now(); strings.HasPrefix(names, "kernel") && g.Info().Sockets < 4+2; time.Sleep(time.Millisecond) {
			if time.Since(begin) > limit(5*time.Second) {
				panic(fmt.Sprintf("%+v", g.Info()))
			}
		}
	}
	if now := notClosedByExec(); !slices.Equal(now, inherited) {
		panic(fmt.Sprintf("descriptors %v are not closed by exec, %v were there before", now, inherited))
	}
	fds := openDescriptors()

	child := exec.Command(self)
	child.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=holdNothing")
	child.Stderr = os.Stderr
	in, err := child.StdinPipe()
	must(err)
	out, err := child.StdoutPipe()
	must(err)
	must(child.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	must(err)
	if want := fmt.Sprintln(inherited); line != want {
		panic(fmt.Sprintf("the child has descriptors %s, want %s", line, want))
	}
	must(g.Close())
	for _, c := range open {
		c.(*net.TCPConn).SetLinger(0) // no TIME_WAIT, which takes the address too
		c.Close()
	}
	ln, err := net.Listen("tcp", address)
	must(err)
	must(ln.Close())
	must(in.Close())
	must(child.Wait())
	fmt.Printf("%d descriptors, all closed by exec; the address is free while the child lives\n", fds)
}

// notClosedByExec returns the descriptors past standard error that exec keeps.
func notClosedByExec() (fds []int) {
	for fd := 3; fd < 4096; fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fds = append(fds, fd)
		}
	}
	return fds
}

func holdNothingWorker() {
	fmt.Println(notClosedByExec())
	io.Copy(io.Discard, os.Stdin)
}

// The directory of a handoff that vanishes while it is in use takes nothing with
// it: the processes go on with what they hold, and when the directory is there
// again, they find together.
func TestHandoffDirectoryVanishes(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
		dir := filepath.Dir(job.Path)
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
		require.NoError(t, os.RemoveAll(dir))
		servers[1].becomes(func(r serverReport) bool { return !isHandedOff(r) })
		require.Contains(t, servers[1].Reason, "no such file or directory")
		servers[0].kill()
		other := beginServer(t, job)
		other.hear()
		require.Contains(t, other.Err, dir)
		servers[1].ask("accept")
		require.Equal(t, n, answered(conns))

		require.NoError(t, os.Mkdir(dir, 0o700))
		servers = append(servers[1:], startServer(t, job))
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		for _, c := range conns {
			c.Close()
		}
		more := standing(t, job.Address, n)
		servers[0].ask("close")
		servers[1].ask("accept")
		servers[2].ask("accept")
		served := answered(more)
		t.Logf("%d tried, %d lost; one of three processes was killed while the directory was gone", 2*n, n-served)
		require.Equal(t, n, served)
	})
}

// A hub that is stopped in the middle of a newcomer's joining delays its Listen
// by a second or two at most; nothing is lost, and when the hub goes on, all
// agree again.
func TestHandoffHubStopsWhileSomebodyJoins(t *testing.T) {
	type joined struct {
		g    *Group
		err  error
		took time.Duration
	}
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		delays := []time.Duration{0, 300 * time.Microsecond, 600 * time.Microsecond, time.Millisecond, 1500 * time.Microsecond, 3 * time.Millisecond}
		sets := make([][3]*server, count(len(delays), 2))
		joins := make([]chan joined, len(sets))
		var conns []net.Conn
		for i := range sets {
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher}
			for k := range sets[i] {
				sets[i][k] = startServer(t, job)
				job.Address = sets[i][0].Address
			}
			for _, s := range sets[i] {
				s.becomes(isHandedOff)
			}
			require.True(t, sets[i][0].Hub)
			conns = append(conns, standing(t, job.Address, count(60, 10))...)
			sets[i][1].kill() // it leaves two sockets to adopt
			opts := []Option{WithHandoff(job.Path)}
			if dispatcher {
				opts = append(opts, WithDispatcher())
			}
			joins[i] = make(chan joined, 1)
			go func() {
				begin := time.Now()
				g, err := ListenGroup(context.Background(), "tcp", job.Address, 2, opts...)
				joins[i] <- joined{g, err, time.Since(begin)}
			}()
			time.Sleep(delays[i])
			sets[i][0].signal(syscall.SIGSTOP)
		}
		var wg sync.WaitGroup
		var accepted atomic.Int64
		var took time.Duration
		var groups []*Group
		for i := range sets {
			j := <-joins[i]
			took = max(took, j.took)
			sets[i][2].ask("accept")
			if j.err != nil { // nobody could give it the one socket there is
				require.True(t, dispatcher)
				require.ErrorContains(t, j.err, "the handoff ")
				continue
			}
			groups = append(groups, j.g)
			for _, l := range j.g.Listeners() {
				wg.Add(1)
				go echo(&wg, l, &accepted)
			}
		}
		served := answered(conns)
		t.Logf("%d times, of which it listened %d times; Listen took %v at most; %d tried, %d lost", len(sets), len(groups), took.Round(time.Millisecond), len(conns), len(conns)-served)
		for _, c := range conns {
			c.Close()
		}
		for _, s := range sets {
			s[0].signal(syscall.SIGCONT)
		}
		for _, s := range sets {
			s[0].becomes(isHandedOff)
			s[2].becomes(isHandedOff)
		}
		for _, g := range groups {
			require.Eventually(t, func() bool { return g.Info().OnKill&InheritHandoff != 0 }, limit(10*time.Second), 10*time.Millisecond, "%+v", g.Info())
			require.NoError(t, g.Close())
		}
		wg.Wait()
		require.Less(t, took, limit(4*time.Second))
		require.Equal(t, len(conns), served)
	})
}

// leftSocket is a balanced socket from which nobody accepts, and what sends it as
// a hub does.
func leftSocket(t testing.TB) (left net.Listener, at place, send func(p rawPeer)) {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return onFD(c, joinsKernel) }}
	lc.SetMultipathTCP(false)
	left, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { left.Close() })
	at = place{"tcp4", "127.0.0.1", left.Addr().(*net.TCPAddr).Port}
	conn, err := left.(*net.TCPListener).SyscallConn()
	require.NoError(t, err)
	return left, at, func(p rawPeer) {
		must(onFD(conn, func(fd uintptr) error {
			d, err := duplicate(fd)
			if err == nil {
				p.send(frame{kind: frameSocket, id: newID(), at: at, sub: at.network, flags: flagBalanced}, d)
				d.release()
			}
			return err
		}))
	}
}

// What a hub sends is shared when it has told everything, or goes: before that it
// holds it, and this process may be short of descriptors.
func TestHandoffHubTellsHalf(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	path := handoffPath(t)
	left, at, sendLeft := leftSocket(t)
	clients := queueUp(t, left.Addr(), 20)
	told, goes := make(chan struct{}), make(chan struct{})
	leave := sync.OnceFunc(func() { close(goes) })
	defer leave()
	sessions := 0
	fakeHub(t, path, func(p rawPeer) {
		defer p.c.Close()
		if sessions++; sessions > 2 {
			return
		}
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: handoffHighest}, nil)
		p.expect(frameSynced)
		if sessions == 2 { // the first one made it serve everything
			sendLeft(p)
			close(told)
			<-goes
		}
	})
	ln, err := Listen("tcp4", at.String(), WithHandoff(path))
	require.NoError(t, err)
	<-told
	time.Sleep(limit(100 * time.Millisecond))
	require.Equal(t, 1, ln.(*Listener).Info().Sockets)
	leave()
	require.Eventually(t, func() bool { return ln.(*Listener).Info().Sockets == 2 }, limit(5*time.Second), time.Millisecond)
	left.Close() // whoever else held it has died
	h := handoffs.m[path]
	h.fail(unix.EMFILE) // no descriptor for a hub
	h.settle()
	for range clients {
		c := acceptWithin(t, ln)
		c.Close()
	}
	require.Equal(t, 2, ln.(*Listener).Info().Sockets)
	require.NoError(t, ln.Close())
}

// A hub that stops when it is asked for a socket that a newcomer wants to adopt
// delays Listen by a second at most; the newcomer opens a socket of its own, and
// serves the other too while nobody is known to.
func TestHandoffHubStopsAtAClaim(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	path := handoffPath(t)
	left, at, sendLeft := leftSocket(t)
	clients := queueUp(t, left.Addr(), 20)
	claimed := make(chan struct{})
	fakeHub(t, path, func(p rawPeer) {
		told := false
		for {
			f, d, err := p.read(limit(30 * time.Second))
			if d != nil {
				d.release()
			}
			if err != nil {
				return
			}
			switch f.kind {
			case frameHello:
				p.send(frame{kind: frameHello, n: handoffHighest}, nil)
			case frameSynced:
				p.send(frame{kind: frameSynced}, nil)
			case frameOn:
				if !told {
					told = true
					sendLeft(p)
				}
				p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
			case frameOwner:
				close(claimed)
				return // and no more
			}
		}
	})
	begin := time.Now()
	ln, err := Listen("tcp4", at.String(), WithHandoff(path))
	require.NoError(t, err)
	require.Less(t, time.Since(begin), 2*exchangeTime+limit(time.Second))
	<-claimed
	clients = append(clients, queueUp(t, left.Addr(), 20)...)
	for range clients {
		c := acceptWithin(t, ln)
		c.Close()
	}
	t.Logf("%d tried, 0 lost", len(clients))
	require.NoError(t, ln.Close())
}

// What a killed process leaves in its queue is answered by another one of the
// handoff; how soon is only said, not judged.
func TestHandoffTimeToInherit(t *testing.T) {
	for _, hub := range []bool{true, false} {
		t.Run(map[bool]string{true: "the hub is killed", false: "another is killed"}[hub], func(t *testing.T) {
			if os.Geteuid() == 0 {
				t.Skip("root: TestUnprivileged runs it as another user")
			}
			modes[0].need(t)
			noLeaks(t)
			var took []time.Duration
			tried, lost := 0, 0
			for range count(20, 3) {
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 1}
				a := startServer(t, job)
				job.Address = a.Address
				b := startServer(t, job)
				dead, heir := a, b
				if !hub {
					dead, heir = b, a
				}
				dead.becomes(isHandedOff)
				heir.becomes(isHandedOff)
				heir.ask("accept")
				conns := standing(t, job.Address, 16)
				var waiting []net.Conn
				for _, ch := range hears(conns, 40*time.Millisecond) {
					if r := <-ch; r.err != nil {
						waiting = append(waiting, r.c)
					}
				}
				begin := time.Now()
				dead.signal(syscall.SIGKILL)
				fastest := time.Hour
				for _, ch := range hears(waiting, 10*time.Second) {
					tried++
					if r := <-ch; r.err != nil {
						lost++
					} else {
						fastest = min(fastest, r.at.Sub(begin))
					}
				}
				if len(waiting) > 0 {
					took = append(took, fastest)
				}
				dead.kill()
				for _, c := range conns {
					c.Close()
				}
				heir.close()
			}
			slices.Sort(took)
			t.Logf("from the kill to the first answer: %v in the median of %d, %v to %v; %d tried, %d lost", took[len(took)/2], len(took), took[0], took[len(took)-1], tried, lost)
			require.Zero(t, lost)
		})
	}
}

// Heard is what a client heard, and when.
type heard struct {
	c   net.Conn
	at  time.Time
	err error
}

// hears waits for a byte of each.
func hears(conns []net.Conn, within time.Duration) (chs []chan heard) {
	deadline := time.Now().Add(limit(within))
	for _, c := range conns {
		ch := make(chan heard, 1)
		chs = append(chs, ch)
		go func() {
			c.SetReadDeadline(deadline)
			_, err := c.Read(make([]byte, 1))
			ch <- heard{c, time.Now(), err}
		}()
	}
	return chs
}
