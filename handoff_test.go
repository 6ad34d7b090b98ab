//go:build unix && !aix

package lblisten

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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

// A server is a process with a handoff, or without one if its job has no path, as
// its parent sees it.
type server struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *json.Decoder
	ended bool
	serverReport
}

// serverJob is what a server is to do, serverReport what it says of itself.
type (
	serverJob struct {
		Path, Network, Address string
		Members                int
		Dispatcher, Accept     bool
		Files                  int // the limit of open files, if not 0
	}
	serverReport struct {
		Err                     string
		Address                 string
		Hub                     bool
		Members, Sockets        int
		Inherited, Accepted     int
		OnClose, OnKill         Inheritance
		Reason                  string
		Goroutines, Descriptors int
		Took                    time.Duration // what it was told to do
	}
)

// serverWorker listens, and obeys: a word a line, each is answered by a report.
// It ends with its standard input.
func serverWorker() {
	var job serverJob
	must(json.Unmarshal([]byte(os.Getenv("LBLISTEN_TEST_JOB")), &job))
	if job.Files > 0 {
		must(setFileLimit(job.Files))
	}
	opts := []Option{WithLB()}
	if job.Path != "" {
		opts = append(opts, WithHandoff(job.Path))
	}
	if job.Dispatcher {
		opts = append(opts, WithDispatcher())
	}
	out := json.NewEncoder(os.Stdout)
	begin := time.Now()
	g, err := ListenGroup(context.Background(), job.Network, job.Address, job.Members, opts...)
	if err != nil {
		out.Encode(serverReport{Err: err.Error()})
		return
	}
	var open sync.WaitGroup
	var accepted atomic.Int64
	accept := func() {
		for _, l := range g.Listeners() {
			open.Add(1)
			go echo(&open, l, &accepted)
		}
	}
	if job.Accept {
		accept()
	}
	report := func(begin time.Time) {
		info, s := g.Info(), g.Stats()
		r := serverReport{Address: g.Addr().String(), Members: info.Members, Sockets: info.Sockets, Inherited: int(s.Inherited), Accepted: int(s.Accepted), OnClose: info.OnClose, OnKill: info.OnKill,
			Goroutines: runtime.NumGoroutine(), Descriptors: openDescriptors(), Took: time.Since(begin), Hub: isHub(job.Path)}
		if info.Reason != nil {
			r.Reason = info.Reason.Error()
		}
		must(out.Encode(r))
	}
	report(begin)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		begin := time.Now()
		switch in.Text() {
		case "accept":
			accept()
		case "close one":
			must(g.Listeners()[0].Close())
		case "files":
			must(setFileLimit(1024))
		case "panic":
			panic("a test says so")
		case "close":
			must(g.Close())
			report(begin)
			open.Wait() // answers what it accepted
			return
		}
		report(begin)
	}
}

// isHub tells whether this process has the hub of a path.
func isHub(path string) bool {
	handoffs.mu.Lock()
	defer handoffs.mu.Unlock()
	h := handoffs.m[path]
	return h != nil && h.isHub()
}

// eachPooled calls f for every socket that this process has of a handoff's pool.
func eachPooled(path string, f func(fd int)) {
	handoffs.mu.Lock()
	h := handoffs.m[path]
	handoffs.mu.Unlock()
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.sockets {
		f(p.d.fd)
	}
}

// startServer starts a server, which ends with the test at the latest.
func startServer(t testing.TB, job serverJob) *server {
	t.Helper()
	s := beginServer(t, job)
	s.hear()
	require.Empty(t, s.Err)
	return s
}

// beginServer doesn't wait for its first report. The server may be started by way
// of another program.
func beginServer(t testing.TB, job serverJob, by ...string) *server {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	if job.Network == "" {
		job.Network = "tcp"
	}
	if job.Members == 0 {
		job.Members = 4
	}
	b, err := json.Marshal(job)
	require.NoError(t, err)
	by = append(slices.Clone(by), self)
	s := &server{t: t, cmd: exec.Command(by[0], by[1:]...)}
	s.cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=server", "LBLISTEN_TEST_JOB="+string(b), "GORACE=atexit_sleep_ms=0")
	s.cmd.Stderr = os.Stderr
	s.in, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := s.cmd.StdoutPipe()
	require.NoError(t, err)
	s.out = json.NewDecoder(out)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(s.end)
	return s
}

func (s *server) hear() {
	s.t.Helper()
	s.serverReport = serverReport{}
	require.NoError(s.t, s.out.Decode(&s.serverReport), "a server ended")
}

// ask tells a server to do something and returns when it has.
func (s *server) ask(word string) serverReport {
	s.t.Helper()
	_, err := fmt.Fprintln(s.in, word)
	require.NoError(s.t, err)
	s.hear()
	return s.serverReport
}

// signal sends a signal, after which the process ends or not.
func (s *server) signal(sig os.Signal) {
	s.t.Helper()
	require.NoError(s.t, s.cmd.Process.Signal(sig))
}

// wait waits until the process is gone.
func (s *server) wait() {
	if !s.ended {
		s.ended = true
		late := time.AfterFunc(limit(20*time.Second), func() {
			s.t.Error("a server doesn't end")
			s.cmd.Process.Kill()
		})
		s.cmd.Wait()
		late.Stop()
	}
}

func (s *server) kill() {
	s.t.Helper()
	s.signal(syscall.SIGKILL)
	s.wait()
}

// close ends a server gracefully.
func (s *server) close() {
	s.t.Helper()
	s.ask("close")
	s.in.Close()
	s.wait()
}

func (s *server) end() {
	if !s.ended {
		s.cmd.Process.Kill()
		s.in.Close()
		s.wait()
	}
}

// becomes waits until a server says something of itself.
func (s *server) becomes(what func(r serverReport) bool) {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return what(s.ask("report")) }, limit(15*time.Second), 10*time.Millisecond, "it says %+v", &s.serverReport)
}

func isHandedOff(r serverReport) bool { return r.OnKill&InheritHandoff != 0 }

// handoffPath returns a path for a handoff.
func handoffPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "lb.sock")
}

// standing connects n clients to servers that don't accept.
func standing(t testing.TB, address string, n int) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := dialOnce("tcp", address)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		conns[i] = c
	}
	return conns
}

// inHandoffModes runs a test in both kinds of handoff: where the kernel balances,
// and where processes share one socket. It is run by an ordinary user only: for a
// privileged one the kernel migrates, which would hide what is lost.
func inHandoffModes(t *testing.T, f func(t *testing.T, dispatcher bool)) {
	if os.Geteuid() == 0 {
		t.Skip("root: TestUnprivileged runs it as another user")
	}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			m.need(t)
			noLeaks(t)
			f(t, m.name == "dispatcher")
		})
	}
}

// The review's experiment: processes with four listeners each that stand still,
// 2000 connections, some of the processes end, and what is left accepts.
func TestHandoffExperiment(t *testing.T) {
	kill := func(s *server) { s.signal(syscall.SIGKILL) }
	for _, c := range []struct {
		name      string
		processes int
		dead      []int // the first one is the hub
		die       func(s *server)
	}{
		{"SIGKILL of the hub, of two", 2, []int{0}, kill},
		{"SIGKILL of the other", 2, []int{1}, kill},
		{"SIGTERM", 2, []int{1}, func(s *server) { s.signal(syscall.SIGTERM) }},
		{"panic", 2, []int{0}, func(s *server) { fmt.Fprintln(s.in, "panic") }},
		{"close", 2, []int{0}, func(s *server) { s.ask("close"); s.in.Close() }},
		{"SIGKILL of the hub, of three", 3, []int{0}, kill},
		{"SIGKILL of two of three", 3, []int{0, 1}, kill},
		{"SIGKILL of the hub and one more, of eight", 8, []int{0, 5}, kill},
		{"SIGKILL of all but one of eight", 8, []int{0, 1, 2, 3, 4, 5, 6}, kill},
	} {
		t.Run(c.name, func(t *testing.T) {
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				path := handoffPath(t)
				servers := make([]*server, c.processes)
				address := "127.0.0.1:0"
				for i := range servers {
					servers[i] = startServer(t, serverJob{Path: path, Address: address, Dispatcher: dispatcher})
					address = servers[0].Address
				}
				require.True(t, servers[0].ask("report").Hub)
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				n := count(2000, 100)
				conns := standing(t, address, n)
				for _, i := range c.dead {
					if c.name == "panic" {
						servers[i].cmd.Stderr = nil
					}
					c.die(servers[i])
				}
				for _, i := range c.dead {
					servers[i].wait()
				}
				for _, s := range servers {
					if !s.ended {
						s.ask("accept")
					}
				}
				served := answered(conns)
				t.Logf("%d tried, %d lost", n, n-served)
				require.Equal(t, n, served)
			})
		})
	}
}

// Rolling restarts under continuous dials lose nothing, whether the new process
// starts before the old one ends or, while another one lives, after it. The
// number of sockets doesn't grow, and the last process has no goroutine and no
// descriptor more than the first.
func TestHandoffRollingRestarts(t *testing.T) {
	for _, newFirst := range []bool{true, false} {
		t.Run(map[bool]string{true: "new before old", false: "old before new"}[newFirst], func(t *testing.T) {
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				const members = 2
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: members, Dispatcher: dispatcher, Accept: true}
				servers := []*server{startServer(t, job)}
				job.Address = servers[0].Address
				servers = append(servers, startServer(t, job))
				restart := func() {
					old := servers[0]
					if newFirst {
						servers = append(servers[1:], startServer(t, job))
						servers[1].becomes(isHandedOff)
						old.close()
					} else {
						servers[1].becomes(isHandedOff)
						old.close()
						servers = append(servers[1:], startServer(t, job))
					}
				}
				restart()
				restart()
				most := func() serverReport {
					a, b := servers[0].ask("report"), servers[1].ask("report") // one of them is the hub
					return serverReport{Sockets: max(a.Sockets, b.Sockets), Goroutines: max(a.Goroutines, b.Goroutines), Descriptors: max(a.Descriptors, b.Descriptors)}
				}
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				first := most()
				d := startLoad(4, "tcp", job.Address)
				restarts := count(50, 6)
				for range restarts {
					restart()
				}
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				d.end(t, !dispatcher)
				var last serverReport
				require.Eventually(t, func() bool {
					last = most()
					return last.Sockets <= first.Sockets && last.Goroutines <= first.Goroutines && last.Descriptors <= first.Descriptors
				}, limit(10*time.Second), 10*time.Millisecond, "%+v, then %+v", &first, &last)
				t.Logf("%d restarts; a process had %d sockets, %d goroutines, %d descriptors after the first two, %d, %d, %d after the last", restarts,
					first.Sockets, first.Goroutines, first.Descriptors, last.Sockets, last.Goroutines, last.Descriptors)
				switch {
				case dispatcher:
					require.Equal(t, 1, last.Sockets)
				case newFirst:
					require.Equal(t, 2*members, last.Sockets, "its own, and those that the newest one left to be adopted")
				default:
					require.Equal(t, members, last.Sockets)
				}
			})
		})
	}
}

// Processes that start at the same instant are one set, whoever binds first, and
// so they are after many of them died in one instant.
func TestHandoffStartAndDieTogether(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 1, Dispatcher: dispatcher}
		if !dispatcher {
			job.Members = 2
		}
		first := startServer(t, job)
		job.Address = first.Address
		n := count(24, 6)
		for range 3 {
			servers := make([]*server, n)
			for i := range servers {
				servers[i] = beginServer(t, job)
			}
			for _, s := range servers {
				s.hear()
				require.Empty(t, s.Err)
			}
			hubs := 0
			for _, s := range append(servers, first) {
				s.becomes(isHandedOff)
				if s.Hub {
					hubs++
				}
			}
			require.Equal(t, 1, hubs, "the set is split")
			conns := standing(t, job.Address, count(400, 40))
			for _, s := range append(servers[1:], first) {
				s.signal(syscall.SIGKILL)
			}
			servers[0].ask("accept")
			require.Equal(t, len(conns), answered(conns))
			for _, s := range append(servers[1:], first) {
				s.wait()
			}
			first = startServer(t, job)
			first.becomes(isHandedOff)
			for _, c := range conns {
				c.Close()
			}
			servers[0].close()
		}
	})
}

// A whole set that starts anew after a crash finds what the crash left: a socket
// file that nobody listens on, and a lock file.
func TestHandoffStaleFiles(t *testing.T) {
	noLeaks(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	servers := []*server{startServer(t, job), startServer(t, job)}
	for _, s := range servers {
		s.kill()
	}
	require.FileExists(t, lockPath(job.Path))
	os.Remove(newPath(job.Path)) // of a hub that died between bind and rename
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: newPath(job.Path)})
	require.NoError(t, err)
	ln.SetUnlinkOnClose(false)
	ln.Close()
	job.Address = "127.0.0.1:0"
	a := startServer(t, job)
	job.Address = a.Address
	b := startServer(t, job)
	a.becomes(isHandedOff)
	b.becomes(isHandedOff)
	b.close()
	a.close()
	require.NoFileExists(t, job.Path)
	require.NoFileExists(t, newPath(job.Path))
	require.FileExists(t, lockPath(job.Path))
}

// Somebody removes the files of a set that lives: it finds together again.
func TestHandoffFilesRemoved(t *testing.T) {
	for _, what := range []func(string) string{func(p string) string { return p }, lockPath} {
		t.Run(filepath.Ext(what("socket")), func(t *testing.T) {
			noLeaks(t)
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
			a := startServer(t, job)
			job.Address = a.Address
			b := startServer(t, job)
			a.becomes(isHandedOff)
			require.NoError(t, os.Remove(what(job.Path)))
			c := startServer(t, job)
			hubs := 0
			for _, s := range []*server{a, b, c} {
				s.becomes(isHandedOff)
			}
			require.Eventually(t, func() bool {
				hubs = 0
				for _, s := range []*server{a, b, c} {
					if r := s.ask("report"); r.Hub && isHandedOff(r) {
						hubs++
					}
				}
				return hubs == 1
			}, limit(5*time.Second), 20*time.Millisecond, "%+v %+v %+v", &a.serverReport, &b.serverReport, &c.serverReport)
			conns := standing(t, job.Address, 60)
			a.kill()
			b.kill()
			c.ask("accept")
			require.Equal(t, len(conns), answered(conns))
		})
	}
}

// A stopped process delays nobody: the others accept and close, listeners join
// within a second or so, and what waits in the stopped one's queue is served by
// the others after silentAfter. When it goes on, the set is whole again. The hub
// is stopped in one case, another process in the other.
func TestHandoffStoppedProcess(t *testing.T) {
	for i, name := range []string{"the hub", "another"} {
		t.Run(name, func(t *testing.T) {
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher}
				var servers []*server
				for range 3 {
					servers = append(servers, startServer(t, job))
					job.Address = servers[0].Address
				}
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				stopped, other := servers[i], servers[2]
				n := count(600, 60)
				conns := standing(t, job.Address, n)
				stopped.signal(syscall.SIGSTOP)
				servers[1-i].ask("accept")
				other.ask("accept")
				begin := time.Now()
				require.Equal(t, n, answered(conns))
				t.Logf("%d tried, 0 lost; those in the stopped process's queue too were served after %v", n, time.Since(begin))
				r := other.ask("close one")
				require.Less(t, r.Took, limit(2*time.Second))
				newcomer := beginServer(t, job)
				newcomer.hear()
				if dispatcher && i == 0 {
					// Nobody can give it the one socket there is.
					require.Contains(t, newcomer.Err, "the hub doesn't answer")
					newcomer = startServer(t, serverJob{Path: job.Path, Address: "127.0.0.1:0"})
					require.Less(t, newcomer.Took, limit(2*time.Second))
					newcomer.close()
					newcomer = other
				} else {
					require.Empty(t, newcomer.Err)
					require.Less(t, newcomer.Took, limit(4*time.Second))
					newcomer.ask("accept")
				}
				more := standing(t, job.Address, n)
				require.Equal(t, n, answered(more))

				stopped.signal(syscall.SIGCONT)
				if newcomer != other {
					servers = append(servers, newcomer)
				}
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				conns = append(conns, more...)
				for _, c := range conns {
					c.Close()
				}
				stopped.ask("accept")
				more = standing(t, job.Address, n)
				require.Equal(t, n, answered(more))
				for _, s := range servers {
					r := s.ask("close")
					require.Less(t, r.Took, limit(2*time.Second))
				}
			})
		})
	}
}

// The end is an end: with the last process of an address everything closes, and
// when it is killed, what waits is kept for the next one for a while.
func TestHandoffEnd(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher}
		refused := func(address string) func() bool {
			return func() bool {
				c, err := dialOnce("tcp", address)
				if err == nil {
					c.Close()
				}
				return isRefused(err)
			}
		}
		elsewhere := startServer(t, job)
		one := startServer(t, job)
		require.NotEqual(t, elsewhere.Address, one.Address)
		require.False(t, isHandedOff(one.ask("report")), "nobody else listens on the address")
		require.Contains(t, one.Reason, "no other process listens on the address")
		address := one.Address
		r := one.ask("close")
		require.Less(t, r.Took, limit(time.Second))
		require.Eventually(t, refused(address), limit(5*time.Second), time.Millisecond) // who listens elsewhere lets go, too

		// Killed, the next one on the address gets what waits.
		again := job
		again.Address = address
		one = startServer(t, again)
		conns := standing(t, address, 40)
		one.kill()
		conns = append(conns, standing(t, address, 40)...)
		again.Accept = true
		one = startServer(t, again)
		require.Equal(t, len(conns), answered(conns))
		for _, c := range conns {
			c.Close()
		}
		one.close()
		require.Eventually(t, refused(address), limit(5*time.Second), time.Millisecond) // who listens elsewhere lets go, too
		require.Empty(t, elsewhere.ask("report").Err)
		elsewhere.close()
		require.Eventually(t, refused(elsewhere.Address), limit(5*time.Second), time.Millisecond)
		require.NoFileExists(t, job.Path)
	})
}

// What is kept for an address that nobody listens on is kept for unservedFor.
func TestHandoffUnserved(t *testing.T) {
	noLeaks(t)
	defer set(&unservedFor, 100*time.Millisecond)()
	defer set(&beatEvery, 50*time.Millisecond)()
	path := handoffPath(t)
	elsewhere, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer elsewhere.Close()
	one := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0"})
	pool := func() (n int) {
		eachPooled(path, func(int) { n++ })
		return n
	}
	require.Equal(t, 1+4, pool())
	conns := standing(t, one.Address, 8)
	one.kill()
	require.Eventually(t, func() bool { return pool() == 1 }, limit(5*time.Second), 5*time.Millisecond)
	require.Zero(t, answered(conns))
}

// Info tells of the handoff only while another process holds the sockets.
func TestHandoffInfo(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		path := handoffPath(t)
		opts := []Option{WithHandoff(path)}
		if dispatcher {
			opts = append(opts, WithDispatcher())
		}
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", opts...)
		is := func(want bool) func() bool {
			return func() bool {
				i := g.Info()
				return i.OnKill&InheritHandoff != 0 == want && i.OnClose&InheritHandoff != 0 == want
			}
		}
		require.True(t, is(false)())
		require.ErrorContains(t, ls[0].Info().Reason, "no other process listens on the address")
		b := startServer(t, serverJob{Path: path, Address: g.Addr().String(), Dispatcher: dispatcher})
		require.True(t, is(true)(), "%+v", g.Info())
		require.Equal(t, "process+handoff", (ls[0].Info().OnClose &^ InheritKernel).String())
		require.NotContains(t, fmt.Sprint(ls[0].Info().Reason), "handoff")
		b.kill()
		require.Eventually(t, is(false), limit(5*time.Second), time.Millisecond)
		if !dispatcher {
			require.Eventually(t, func() bool { return g.Info().Sockets == 2+4 }, limit(5*time.Second), time.Millisecond)
		}
	})
}

// Several addresses, of several networks, use one path.
func TestHandoffSeveralAddresses(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	type addr struct{ network, address string }
	var addrs []addr
	var mine []*Listener
	for _, e := range endpoints[:3] {
		e.need(t)
		addrs = append(addrs, addr{e.network, e.listen})
	}
	addrs = append(addrs, addr{"unix", filepath.Join(filepath.Dir(path), "app.sock")})
	var jobs []serverJob
	for _, a := range addrs {
		_, ls := newTestGroup(t, 1, a.network, a.address, WithHandoff(path))
		mine = append(mine, ls[0])
		jobs = append(jobs, serverJob{Path: path, Network: a.network, Address: ls[0].Addr().String(), Members: 1})
	}
	for i, job := range jobs {
		s := startServer(t, job)
		s.becomes(isHandedOff)
		require.NotZero(t, mine[i].Info().OnKill&InheritHandoff)
		for range 2 {
			c := dialTest(t, mine[i].Addr())
			_, err := c.Write([]byte("x"))
			require.NoError(t, err)
			defer c.Close()
		}
		s.kill()
	}
	for i := range jobs {
		for range 2 {
			acceptWithin(t, mine[i])
		}
	}
	for _, l := range mine {
		require.NoError(t, l.Close())
	}
	require.NoFileExists(t, addrs[3].address)
}

// A unix socket's file stays while another process accepts from the socket.
func TestHandoffUnixSocketFile(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	app := filepath.Join(filepath.Dir(path), "app.sock")
	a, err := Listen("unix", app, WithHandoff(path))
	require.NoError(t, err)
	b := startServer(t, serverJob{Path: path, Network: "unix", Address: app})
	require.NoError(t, a.Close())
	c := dialTest(t, a.Addr())
	_, err = c.Write([]byte("x"))
	require.NoError(t, err)
	b.ask("accept")
	require.Equal(t, 1, answered([]net.Conn{c}))
	c.Close()
	b.close()
	require.NoFileExists(t, app)
}

// A unix socket is the same one however its path is spelled, and another one in
// another directory. Addr is as package net's, but with a handoff, whose processes
// have directories of their own.
func TestUnixSocketInTheDirectory(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	before, err := os.Getwd()
	require.NoError(t, err)
	defer os.Chdir(before)
	require.NoError(t, os.Chdir(filepath.Dir(path)))
	here, err := os.Getwd()
	require.NoError(t, err)
	for _, c := range []struct {
		name, addr string
		opt        Option
	}{
		{"handoff", filepath.Join(here, "app.sock"), WithHandoff(path)},
		{"none", "app.sock", WithLB()},
	} {
		a, err := Listen("unix", "app.sock", c.opt)
		require.NoError(t, err, c.name)
		require.Equal(t, c.addr, a.Addr().String())
		for _, spelled := range []string{"app.sock", filepath.Join(here, "app.sock")} {
			b, err := Listen("unix", spelled, WithLB())
			require.NoError(t, err, "%s, %s", c.name, spelled)
			require.Equal(t, 2, a.(*Listener).Info().Members)
			require.NoError(t, b.Close())
		}
		require.NoError(t, os.Mkdir(c.name, 0o700))
		require.NoError(t, os.Chdir(c.name))
		other, err := Listen("unix", "app.sock", WithLB())
		require.NoError(t, err)
		require.Equal(t, 1, a.(*Listener).Info().Members)
		require.NoError(t, other.Close())
		require.NoError(t, os.Chdir(".."))
		require.NoError(t, a.Close())
		require.NoFileExists(t, "app.sock")
	}
}

// Who was killed doesn't count as one who accepts, also if the hub has not read
// its last words yet.
func TestHandoffHubLooksWhoLives(t *testing.T) {
	noLeaks(t)
	ln, err := net.Listen("unix", handoffPath(t))
	require.NoError(t, err)
	defer ln.Close()
	h := &hub{peers: make(map[*hubPeer]bool)}
	at := place{network: "unix", host: "/app.sock"}
	join := func() (*hubPeer, net.Conn) {
		c, err := net.Dial("unix", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		p := &hubPeer{w: newRawPeer(t, acceptWithin(t, ln)).wire, on: map[place]bool{at: true}}
		h.peers[p] = true
		return p, c
	}
	one, _ := join()
	_, other := join()
	require.EqualValues(t, flagOK, h.offLocked(one, at))
	_, err = other.Write([]byte("last words"))
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.Zero(t, h.offLocked(one, at))
}

// A new hub doesn't wait for processes that have come and gone.
func TestHandoffHubWaitsForNobodyTwice(t *testing.T) {
	h := &hub{young: true, expected: 2, peers: make(map[*hubPeer]bool), count: make(chan int, 1)}
	var came []*hubPeer
	for range h.expected {
		require.False(t, h.completeLocked())
		p := &hubPeer{asked: true, synced: true}
		h.peers[p] = true
		came = append(came, p)
	}
	for _, p := range came {
		require.True(t, h.completeLocked())
		h.leaveLocked(p)
	}
	require.True(t, h.completeLocked())
}

// A unix socket's file goes with the last process, also right after the others
// were killed.
func TestHandoffUnixSocketFileOfTheLast(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	app := filepath.Join(filepath.Dir(path), "app.sock")
	job := serverJob{Path: path, Network: "unix", Address: app, Members: 1}
	for range count(20, 4) {
		var others []*server
		first := rand.IntN(2) == 0 // and the hub
		if !first {
			others = append(others, startServer(t, job))
		}
		a, err := Listen("unix", app, WithHandoff(path))
		require.NoError(t, err)
		for _, b := range append(others, startServer(t, job)) {
			b.kill()
		}
		require.NoError(t, a.Close())
		require.NoFileExists(t, app, "first: %v", first)
	}
}

// Bad paths are refused with an error that names them and says what to do, and
// nothing is harmed.
func TestHandoffBadPath(t *testing.T) {
	noLeaks(t)
	dir := filepath.Dir(handoffPath(t))
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "dir"), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "open"), 0o700))
	require.NoError(t, os.Chmod(filepath.Join(dir, "open"), 0o777))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "locked.lock"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pid.lock"), []byte("12345\n"), 0o600))
	require.NoError(t, os.Symlink(file, filepath.Join(dir, "link.lock")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "closed"), 0o500))
	for _, c := range []struct{ path, want string }{
		{"", "the path is empty"},
		{"a\x00b", "NUL"},
		{filepath.Join(dir, strings.Repeat("x", 100)), "choose a shorter one"},
		{filepath.Join(dir, "none", "lb"), "no such file or directory"},
		{filepath.Join(file, "lb"), "not a directory"},
		{filepath.Join(dir, "dir"), "is not a unix socket: choose another path"},
		{file, "is not a unix socket: choose another path"},
		{filepath.Join(dir, "pid"), "is not the lock file of a handoff"},
		{filepath.Join(dir, "open", "lb"), "can be written to by others"},
		{filepath.Join(dir, "locked"), "lock file"},
		{filepath.Join(dir, "link"), "lock file"},
		{filepath.Join(dir, "closed", "lb"), "permission denied"},
	} {
		if c.want == "permission denied" && os.Geteuid() == 0 {
			continue // TestUnprivileged has this case
		}
		ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(c.path))
		require.ErrorContains(t, err, c.want, "%q", c.path)
		require.ErrorContains(t, err, "127.0.0.1:0")
		require.ErrorContains(t, err, "WithHandoff")
		require.Nil(t, ln)
		require.IsType(t, (*net.OpError)(nil), err)
	}
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
}

// What doesn't fit is refused with both named.
func TestHandoffConflicts(t *testing.T) {
	noLeaks(t)
	a, b := handoffPath(t), handoffPath(t)
	modes[0].need(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(a))
	require.NoError(t, err)
	defer ln.Close()
	plain, err := Listen("tcp", "127.0.0.1:0", WithLB())
	require.NoError(t, err)
	defer plain.Close()
	address := ln.Addr().String()
	joinTest(t, ln, WithLB()).Close()
	joinTest(t, ln, WithHandoff(filepath.Join(filepath.Dir(a), ".", filepath.Base(a)))).Close()
	for _, c := range []struct {
		address string
		opts    []Option
		want    []string
	}{
		{address, []Option{WithHandoff(b)}, []string{a, b}},
		{plain.Addr().String(), []Option{WithHandoff(b)}, []string{b, "no handoff"}},
		{address, []Option{WithHandoff(a), WithDispatcher()}, []string{"WithDispatcher"}},
		{"127.0.0.1:0", []Option{WithHandoff(a), WithSteering(SteerSource)}, []string{"source", "not supported"}},
		{"127.0.0.1:0", []Option{WithHandoff(a), WithRequireKernel(), WithSteering(SteerLoad)}, []string{"load", "not supported"}},
		{"127.0.0.1:0", []Option{WithHandoff(a), WithReusePort()}, []string{"WithReusePort"}},
	} {
		_, err := Listen("tcp", c.address, c.opts...)
		for _, want := range c.want {
			require.ErrorContains(t, err, want)
		}
	}
	_, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", handoffSockets+1, WithHandoff(a))
	require.ErrorIs(t, err, ErrGroupFull)
	lower, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer lower.Close()
	_, err = Dispatch(lower, 1, WithHandoff(a))
	require.ErrorContains(t, err, "WithHandoff")
	// Another process has the address and doesn't share it.
	for _, opt := range []Option{WithRequireKernel(), WithDispatcher()} {
		_, err = Listen("tcp", lower.Addr().String(), opt, WithHandoff(a))
		require.True(t, isAddrInUse(err), "%v", err)
	}
}

// rawPeer speaks with a hub, or as one, a frame at a time.
type rawPeer struct {
	t testing.TB
	*wire
}

func newRawPeer(t testing.TB, c net.Conn) rawPeer {
	w := newWire(c.(*net.UnixConn))
	t.Cleanup(func() {
		w.close()
		w.drain()
	})
	return rawPeer{t, w}
}

func dialHub(t testing.TB, path string) rawPeer {
	t.Helper()
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	return newRawPeer(t, c)
}

// expect returns the next frame of a kind; others before it are none of its
// business.
func (p rawPeer) expect(kind byte) (frame, *descriptor) {
	p.t.Helper()
	for {
		f, d, err := p.read(limit(5 * time.Second))
		require.NoError(p.t, err)
		if f.kind == kind {
			return f, d
		}
		if d != nil {
			d.release()
		}
	}
}

// ended waits until the other end has closed the connection.
func (p rawPeer) isEnded() {
	p.t.Helper()
	for {
		_, d, err := p.read(limit(5 * time.Second))
		if d != nil {
			d.release()
		}
		if err != nil {
			require.NotErrorIs(p.t, err, os.ErrDeadlineExceeded)
			return
		}
	}
}

func (p rawPeer) hello(lowest, highest uint32) {
	p.send(frame{kind: frameHello, n: lowest<<16 | highest, process: newID(), at: place{network: helloName}}, nil)
}

// fakeHub holds the lock of a path and listens there, and does what a test says
// with the one process that comes.
func fakeHub(t testing.TB, path string, do func(p rawPeer)) {
	lock, err := openLock(path)
	require.NoError(t, err)
	conn, err := lock.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, onFD(conn, func(fd uintptr) error { return unix.Flock(int(fd), unix.LOCK_EX) }))
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	ended := make(chan struct{})
	var peers []*wire
	go func() {
		defer close(ended)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p := rawPeer{t, newWire(c.(*net.UnixConn))}
			peers = append(peers, p.wire)
			do(p)
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-ended
		for _, w := range peers {
			w.close()
			w.drain()
		}
		lock.Close()
	})
}

// A hub that stops at any step of the protocol delays Listen, Accept and Close by
// a second or so at most, and nothing is lost that they serve.
func TestHandoffHubStopsAtEachStep(t *testing.T) {
	// answering lets a hub answer until it hears a frame of a kind, and then no more.
	answering := func(until byte) func(p rawPeer) {
		return func(p rawPeer) {
			for {
				f, d, err := p.read(limit(30 * time.Second))
				if d != nil {
					d.release()
				}
				if err != nil || f.kind == until {
					return
				}
				switch f.kind {
				case frameHello:
					p.send(frame{kind: frameHello, n: handoffHighest}, nil)
				case frameSynced:
					p.send(frame{kind: frameSynced}, nil)
				case frameSocket, frameOn, frameOwner, frameOff:
					p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
				}
			}
		}
	}
	for _, step := range []struct {
		name string
		kind byte
	}{{"hello", frameHello}, {"the list", frameSynced}, {"a deposit", frameSocket}, {"an address", frameOn}, {"leaving", frameOff}} {
		t.Run(step.name, func(t *testing.T) {
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				path := handoffPath(t)
				fakeHub(t, path, answering(step.kind))
				opts := []Option{WithHandoff(path)}
				if dispatcher {
					opts = append(opts, WithDispatcher())
				}
				within := func(what string, f func()) {
					t.Helper()
					begin := time.Now()
					f()
					require.Less(t, time.Since(begin), exchangeTime+limit(500*time.Millisecond), what)
				}
				var g *Group
				within("Listen", func() {
					var err error
					g, err = ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opts...)
					require.NoError(t, err)
				})
				i := g.Info()
				require.Zero(t, i.OnKill&InheritHandoff)
				require.ErrorContains(t, i.Reason, "the handoff "+path)
				clients := queueUp(t, g.Addr(), 9)
				ls := g.Listeners()
				within("Accept and Close", func() {
					require.NoError(t, ls[0].Close())
					require.NoError(t, ls[1].Close())
					for range clients {
						n := answer(t, acceptWithin(t, ls[2]))
						wantAnswer(t, clients[n], n)
					}
				})
				within("the last Close", func() { require.NoError(t, ls[2].Close()) })
			})
		})
	}
}

// What a process does with the hub of an attacker, or of a bug: it takes no
// descriptor that isn't what it is said to be, and goes on.
func TestHandoffBadHub(t *testing.T) {
	noLeaks(t)
	plain, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer plain.Close()
	other, err := Listen("tcp4", "127.0.0.1:0", WithRequireKernel())
	if err != nil {
		t.Skipf("the kernel doesn't balance here: %v", err)
	}
	defer other.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	path := handoffPath(t)
	file, err := os.Create(filepath.Join(filepath.Dir(path), "file"))
	require.NoError(t, err)
	defer file.Close()
	unbound, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(unbound)

	sent, done := make(chan struct{}), false
	fakeHub(t, path, func(p rawPeer) {
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: handoffHighest}, nil)
		p.expect(frameSynced)
		p.send(frame{kind: frameSynced}, nil)
		f, d, err := p.read(limit(5 * time.Second))
		for err == nil {
			if d != nil {
				d.release()
			}
			if f.kind == frameSocket || f.kind == frameOn {
				p.send(frame{kind: frameReply, n: f.n, flags: flagOK}, nil)
			}
			if f.kind == frameOn && !done {
				done = true
				for _, s := range []syscall.Conn{plain.(*net.TCPListener), other.(*Listener), udp.(*net.UDPConn), file} {
					conn, err := s.SyscallConn()
					require.NoError(t, err)
					var d *descriptor
					require.NoError(t, onFD(conn, func(fd uintptr) (err error) { d, err = duplicate(fd); return err }))
					p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp4", flags: flagBalanced}, d)
					p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp6", flags: flagBalanced}, d)
					d.release()
				}
				d := newDescriptor(unbound)
				d.hold() // it is closed above
				p.send(frame{kind: frameSocket, id: newID(), at: f.at, sub: "tcp4", flags: flagBalanced}, d)
				for kind := range 32 { // without a sense
					p.send(frame{kind: byte(kind), id: newID(), n: 77, at: place{network: "x", host: "y", port: 1}}, nil)
				}
				close(sent)
			}
			f, d, err = p.read(limit(5 * time.Second))
		}
	})
	ln, err := Listen("tcp4", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	<-sent
	time.Sleep(limit(50 * time.Millisecond))
	require.Equal(t, 1, ln.(*Listener).Info().Sockets)
	c := dialTest(t, ln.Addr())
	acceptWithin(t, ln)
	c.Close()
	require.NoError(t, ln.Close())
}

// What a hub does with a peer that speaks nonsense: it ends the connection, and
// nothing else.
func TestHandoffBadPeer(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	hello := (&frame{kind: frameHello, n: handoffHighest, process: newID(), at: place{network: helloName}}).append(nil)
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	rights := func(n int) []byte {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		return unix.UnixRights(fds...)
	}
	socket := (&frame{kind: frameSocket, n: 1, id: newID()}).append(nil)
	b := startServer(t, serverJob{Path: path, Address: ln.Addr().String()})
	b.close() // from here on there are its sockets to adopt
	before := openDescriptors()
	for _, c := range []struct {
		name   string
		bytes  []byte
		rights []byte
		ends   bool // at once
	}{
		{"nothing", nil, nil, true}, // within exchangeTime
		{"garbage", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), nil, true},
		{"zeroes", make([]byte, 4096), nil, true},
		{"half a message", hello[:20], nil, true},
		{"no hello first", socket, rights(1), true},
		{"a descriptor that isn't there", append(append([]byte{}, hello...), socket...), nil, true},
		{"a descriptor that is a file", append(append([]byte{}, hello...), socket...), rights(1), false},
		{"a descriptor without a message", hello, rights(3), false},
		{"too many descriptors", hello, rights(messageDescriptors + 1), true},
		{"very many descriptors", hello, rights(250), true},
		{"every kind of frame", func() []byte {
			b := append([]byte{}, hello...)
			for kind := range byte(64) {
				if kind != frameSocket {
					b = (&frame{kind: kind, id: newID(), n: 1 << 31, at: place{network: "tcp", host: "::", port: 65535}}).append(b)
				}
			}
			return b
		}(), nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("unix", path)
			require.NoError(t, err)
			u := conn.(*net.UnixConn)
			defer u.Close()
			if c.bytes != nil {
				_, _, err = u.WriteMsgUnix(c.bytes, c.rights, nil)
				require.NoError(t, err)
			}
			u.SetReadDeadline(time.Now().Add(exchangeTime + limit(2*time.Second)))
			if c.ends {
				_, err = io.Copy(io.Discard, u)
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
			}
			u.Close()
			require.Eventually(t, func() bool { return openDescriptors() <= before }, limit(5*time.Second), time.Millisecond, "descriptors are left over")
			b := startServer(t, serverJob{Path: path, Address: ln.Addr().String()})
			require.NotZero(t, ln.(*Listener).Info().OnKill&InheritHandoff)
			b.close()
		})
	}
}

// A peer that stops reading, and one that is silent, are taken for gone, and
// delay nobody.
func TestHandoffPeerThatStopsReading(t *testing.T) {
	noLeaks(t)
	defer set(&silentAfter, limit(500*time.Millisecond))()
	defer set(&beatEvery, limit(100*time.Millisecond))()
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	p := dialHub(t, path)
	p.hello(1, handoffHighest)
	p.expect(frameHello)
	p.send(frame{kind: frameSynced}, nil)
	p.expect(frameSynced)
	at, _, err := resolve(context.Background(), "tcp", ln.Addr().String())
	require.NoError(t, err)
	p.send(frame{kind: frameOn, n: 5, at: at}, nil)
	p.expect(frameReply)
	require.Eventually(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff != 0 }, limit(5*time.Second), time.Millisecond)
	begin := time.Now()
	more, err := Listen("tcp", ln.Addr().String(), WithHandoff(path)) // it doesn't confirm the socket
	require.NoError(t, err)
	require.Less(t, time.Since(begin), exchangeTime)
	require.NoError(t, more.Close())
	p.mu.Lock() // its writer beats no more
	p.isEnded()
	p.mu.Unlock()
	require.Eventually(t, func() bool { return ln.(*Listener).Info().OnKill&InheritHandoff == 0 }, limit(5*time.Second), time.Millisecond)
}

// The hello agrees on the lower of two versions, and says so if there is none.
func TestHandoffVersions(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	for _, c := range []struct{ lowest, highest, want uint32 }{{1, 1, 1}, {1, 2, 1}, {0, 1, 1}, {2, 3, 0}, {0, 0, 0}} {
		p := dialHub(t, path)
		p.hello(c.lowest, c.highest)
		f, _ := p.expect(frameHello)
		require.Equal(t, c.want, f.n, "%+v", c)
		if c.want == 0 {
			p.isEnded()
		}
		p.wire.c.Close()
	}
	require.NoError(t, ln.Close())
	fakeHub(t, path, func(p rawPeer) {
		p.expect(frameHello)
		p.send(frame{kind: frameHello, n: 0}, nil)
	})
	ln, err = Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	require.ErrorContains(t, ln.(*Listener).Info().Reason, "other versions")
	require.NoError(t, ln.Close())
}

// Frames of kinds that this version doesn't know, and longer ones, are passed
// over.
func TestHandoffLaterFrames(t *testing.T) {
	later := frame{kind: 200, n: 7, at: place{network: "tcp", host: "::1", port: 80}}
	b := later.append(nil)
	b = append(b, "more to come"...)
	b[0], b[1] = byte((len(b)-2)>>8), byte(len(b)-2)
	b = (&frame{kind: frameBeat}).append(b)
	f, n, err := decodeFrame(b)
	require.NoError(t, err)
	require.Equal(t, later, f)
	f, _, err = decodeFrame(b[n:])
	require.NoError(t, err)
	require.EqualValues(t, frameBeat, f.kind)
}

// FuzzFrame feeds the decoder: it never takes more than there is, and what it
// makes of bytes encodes to what it decodes again.
func FuzzFrame(f *testing.F) {
	f.Add((&frame{kind: frameSocket, flags: 3, n: 9, id: newID(), process: newID(), at: place{network: "tcp", host: "::", port: 8080}, sub: "tcp6"}).append(nil))
	f.Add([]byte{0, 45})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			got, n, err := decodeFrame(b)
			if err != nil || n == 0 {
				return
			}
			if n > len(b) {
				t.Fatalf("took %d of %d bytes", n, len(b))
			}
			again, m, err := decodeFrame(got.append(nil))
			if err != nil || again != got || m > n {
				t.Fatalf("%+v became %+v (%v)", got, again, err)
			}
			b = b[n:]
		}
	})
}

// Without descriptors a process goes on alone, says why, and is one of the set
// as soon as it has some again.
func TestHandoffOutOfDescriptors(t *testing.T) {
	noLeaks(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 60}
	a := startServer(t, job)
	short := serverJob{Path: job.Path, Address: a.Address, Members: 4, Files: 50}
	b := startServer(t, short)
	require.Contains(t, b.Reason, "the handoff "+job.Path)
	require.False(t, isHandedOff(b.serverReport))
	b.ask("accept")
	conns := standing(t, a.Address, 5)
	b.ask("files")
	b.becomes(isHandedOff)
	a.becomes(isHandedOff)
	conns = append(conns, standing(t, a.Address, count(200, 50))...)
	a.kill()
	require.Equal(t, len(conns), answered(conns))
}

// A path on which another program listens is left to it.
func TestHandoffPathOfAnotherProgram(t *testing.T) {
	noLeaks(t)
	for _, name := range []func(string) string{func(p string) string { return p }, newPath} {
		path := handoffPath(t)
		other, err := net.Listen("unix", name(path))
		require.NoError(t, err)
		ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
		require.NoError(t, err)
		require.ErrorContains(t, ln.(*Listener).Info().Reason, "another program listens on "+name(path))
		require.NoError(t, ln.Close())
		require.FileExists(t, name(path))
		other.Close()
	}
}

// One process closes in the instant in which the hub dies: the third one keeps
// everything.
func TestHandoffHubDiesWhileAnotherCloses(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		for round := range count(30, 4) {
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher}
			if dispatcher {
				job.Network, job.Address = "unix", filepath.Join(filepath.Dir(job.Path), "app.sock")
			}
			var servers []*server
			for range 3 {
				servers = append(servers, startServer(t, job))
				job.Address = servers[0].Address
			}
			for _, s := range servers {
				s.becomes(isHandedOff)
			}
			a, b, c := servers[0], servers[1], servers[2]
			network := "tcp"
			if dispatcher {
				network = "unix"
			}
			var conns []net.Conn
			for range 60 {
				conn, err := dialOnce(network, job.Address)
				require.NoError(t, err)
				defer conn.Close()
				_, err = conn.Write([]byte("x"))
				require.NoError(t, err)
				conns = append(conns, conn)
			}
			a.signal(syscall.SIGKILL)
			time.Sleep(time.Duration(round%6) * time.Millisecond)
			b.ask("close")
			b.in.Close()
			b.wait()
			a.wait()
			c.ask("accept")
			require.Equal(t, len(conns), answered(conns), "round %d", round)
			if dispatcher {
				require.FileExists(t, job.Address)
			}
			for _, conn := range conns {
				conn.Close()
			}
			c.close()
		}
	})
}

// What is kept for an address without a process is let go in time, although the
// hub has changed since.
func TestHandoffUnservedAfterHubChange(t *testing.T) {
	noLeaks(t)
	defer set(&unservedFor, 200*time.Millisecond)()
	defer set(&beatEvery, 50*time.Millisecond)()
	path := handoffPath(t)
	hub := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 1})
	mine, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer mine.Close()
	last := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 2})
	last.kill()
	hub.kill()
	require.Eventually(t, func() bool {
		c, err := dialOnce("tcp", last.Address)
		if err == nil {
			c.Close()
		}
		return isHub(path) && isRefused(err)
	}, limit(10*time.Second), 10*time.Millisecond)
}

// Past 256 sockets of a process the others take no more. Info says so, and
// nothing else suffers.
func TestHandoffTakesSoManySockets(t *testing.T) {
	noLeaks(t)
	defer set(&handoffMost, 6)()
	path := handoffPath(t)
	_, ls := newTestGroup(t, 4, "tcp4", "127.0.0.1:0", WithHandoff(path))
	b := startServer(t, serverJob{Path: path, Address: ls[0].Addr().String(), Members: 1})
	for range 3 {
		begin := time.Now()
		_, more := newTestGroup(t, 4, "tcp4", "127.0.0.1:0", WithHandoff(path))
		require.Less(t, time.Since(begin), exchangeTime)
		require.NotZero(t, ls[0].Info().OnKill&InheritHandoff)
		c := startServer(t, serverJob{Path: path, Address: more[0].Addr().String(), Members: 1})
		require.ErrorContains(t, more[0].Info().Reason, "don't have every socket")
		c.close()
		for _, l := range more {
			l.Close()
		}
	}
	b.close()
}

// A hub that doesn't get a socket from the first process that has it asks the
// next.
func TestHandoffHubAsksTheNext(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	h, err := startHub(path, newID())
	require.NoError(t, err)
	defer h.close()
	id := newID()
	silent, other := dialHub(t, path), dialHub(t, path)
	silent.hello(1, 1)
	silent.expect(frameHello)
	silent.send(frame{kind: frameHas, id: id}, nil)
	silent.expect(frameWant)
	other.hello(1, 1)
	other.expect(frameHello)
	other.send(frame{kind: frameHas, id: id, flags: flagMine | flagBalanced}, nil)
	other.send(frame{kind: frameSynced}, nil)
	other.expect(frameWant)
	other.expect(frameSynced)
}

// The logger hears of deposits, adoptions and inheritances.
func TestHandoffLog(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	var mu sync.Mutex
	var text strings.Builder
	says := func(what string) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return strings.Contains(text.String(), what)
		}
	}
	logger := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return text.Write(b)
	}), nil))
	path := handoffPath(t)
	_, ls := newTestGroup(t, 1, "tcp", "127.0.0.1:0", WithHandoff(path), WithLogger(logger))
	require.True(t, says("a socket is deposited")())
	require.True(t, says("this process is the hub")())
	b := startServer(t, serverJob{Path: path, Address: ls[0].Addr().String(), Members: 1})
	b.kill()
	require.Eventually(t, says("this process serves a socket that nobody else is known to accept from"), limit(5*time.Second), time.Millisecond)
	require.NoError(t, joinTest(t, ls[0], WithHandoff(path), WithLogger(logger)).Close())
	require.True(t, says("a new member adopted the socket")())
	require.True(t, says("siblings inherit the socket of a closed member")())
	require.True(t, says("address="+ls[0].Addr().String())())
}

// A socket that the hub refuses isn't said to be deposited.
func TestHandoffLogOfARefusal(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	t.Cleanup(set(&handoffMost, 1)) // when the hub has ended
	var mu sync.Mutex
	lines := map[string]int{}
	logger := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		for _, what := range []string{"a socket is deposited", "a socket is not deposited yet", "the hub refuses it"} {
			lines[what] += strings.Count(string(b), what)
		}
		return len(b), nil
	}), nil))
	newTestGroup(t, 3, "tcp4", "127.0.0.1:0", WithHandoff(handoffPath(t)), WithLogger(logger))
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, map[string]int{"a socket is deposited": 1, "a socket is not deposited yet": 2, "the hub refuses it": 2}, lines)
}

// A peer that sends sockets without end doesn't use up the descriptors of the
// process that is the hub: the last quarter is for its own.
func TestHandoffPeerThatFloods(t *testing.T) {
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "flooded", "LBLISTEN_TEST_PATH="+handoffPath(t)))
}

func floodedWorker() {
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(os.Getenv("LBLISTEN_TEST_PATH")))
	must(err)
	c, err := net.Dial("unix", os.Getenv("LBLISTEN_TEST_PATH"))
	must(err)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	must(err)
	d := newDescriptor(fd)
	must(setFileLimit(128))
	w := newWire(c.(*net.UnixConn))
	w.send(frame{kind: frameHello, n: 1<<16 | 1, process: newID(), at: place{network: helloName}}, nil)
	kept := 0
	for n := range uint32(200) { // one after the other: the system limits descriptors on their way, too
		w.send(frame{kind: frameSocket, n: n + 1, id: newID(), at: place{network: "tcp", host: "::", port: 1}}, d)
		for answered := false; !answered; {
			f, d, err := w.read(limit(10 * time.Second))
			must(err)
			if d != nil {
				d.release()
			}
			if answered = f.kind == frameReply; answered && f.flags&flagOK != 0 {
				kept++
			}
		}
	}
	if kept > 96 {
		panic(fmt.Sprintf("the hub keeps %d sockets", kept))
	}
	for range 8 { // two descriptors each
		_, err := net.Dial("tcp", ln.Addr().String())
		must(err)
		_, err = ln.Accept()
		must(err)
	}
	fmt.Println("ok")
}
