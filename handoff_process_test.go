//go:build unix && !aix

package lblisten

// Processes with a handoff, as their parent sees them.

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
		Systemd                bool
		Files                  int // the limit of open files, if not 0
	}
	serverReport struct {
		Err                     string
		Address                 string
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
	if job.Systemd {
		opts = append(opts, WithSystemd())
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
			Goroutines: runtime.NumGoroutine(), Descriptors: openDescriptors(), Took: time.Since(begin)}
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
		case "full":
			must(setFileLimit(openDescriptors())) // nothing more can be opened
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
	for _, p := range h.pool.sockets {
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
	return beginServerBy(t, (*exec.Cmd).Start, job, by...)
}

func beginServerBy(t testing.TB, start func(*exec.Cmd) error, job serverJob, by ...string) *server {
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
	require.NoError(t, start(s.cmd))
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

// inHandoffModes runs a test in both kinds of handoff: where the kernel balances,
// and where processes share one socket. It is run by an ordinary user only: for a
// privileged one the kernel migrates, which would hide what is lost.
func inHandoffModes(t *testing.T, f func(t *testing.T, dispatcher bool)) {
	if os.Geteuid() == 0 {
		t.Skip("root: TestUnprivileged runs it as another user")
	}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			if isBeside(t) {
				beside(t)
			}
			m.need(t)
			noLeaks(t)
			f(t, m.name == "dispatcher")
		})
	}
}
