//go:build unix && !aix

package lblisten

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A server is a process with a handoff, as its parent sees it.
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
		Inherited               int
		OnClose, OnKill         Inheritance
		Reason                  string
		Goroutines, Descriptors int
		Took                    time.Duration // what it was told to do
	}
)

func init() { workers["server"] = serverWorker }

// serverWorker listens, and obeys: a word a line, each is answered by a report.
// It ends with its standard input.
func serverWorker() {
	var job serverJob
	must(json.Unmarshal([]byte(os.Getenv("LBLISTEN_TEST_JOB")), &job))
	if job.Files > 0 {
		must(setFileLimit(job.Files))
	}
	opts := []Option{WithHandoff(job.Path)}
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
		r := serverReport{Address: g.Addr().String(), Members: info.Members, Sockets: info.Sockets, Inherited: int(s.Inherited), OnClose: info.OnClose, OnKill: info.OnKill,
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
	return h != nil && h.isHub.Load()
}

// startServer starts a server, which ends with the test at the latest.
func startServer(t testing.TB, job serverJob) *server {
	t.Helper()
	s := beginServer(t, job)
	s.hear()
	require.Empty(t, s.Err)
	return s
}

// beginServer doesn't wait for its first report.
func beginServer(t testing.TB, job serverJob) *server {
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
	s := &server{t: t, cmd: exec.Command(self)}
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
		io.Copy(io.Discard, s.out.Buffered())
		s.cmd.Wait()
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

// answered counts the clients that get their answer.
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

// in both kinds of handoff: where the kernel balances, and where processes
// share one socket.
func inHandoffModes(t *testing.T, f func(t *testing.T, dispatcher bool)) {
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
				t.Logf("%d connections, %d lost", n, n-served)
				require.Equal(t, n, served)
			})
		})
	}
}
