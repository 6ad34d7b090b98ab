// Package exampletest runs the examples for their tests, as processes of their
// own: the test binary starts itself again as the example's main, so nothing has
// to be built. And it holds the clients that count what fails meanwhile.
package exampletest

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Variable of the environment makes a test binary the example. A process that Start has started ends
// with its standard input, and so with the test. What it starts itself, doesn't.
const (
	Variable = "LBLISTEN_EXAMPLE"
	watched  = "watched"
	free     = "free"
)

// Main is for TestMain. It runs main in a process that Start has started, and the
// tests in any other, after which no goroutine may be left.
func Main(m *testing.M, main func()) {
	switch os.Getenv(Variable) {
	case watched:
		os.Setenv(Variable, free)
		go func() {
			io.Copy(io.Discard, os.Stdin)
			os.Exit(3)
		}()
		fallthrough
	case free:
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// Limit is a time limit for this machine: LBLISTEN_TEST_SLOW times d.
func Limit(d time.Duration) time.Duration {
	if slow, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64); err == nil && slow > 1 {
		return time.Duration(float64(d) * slow)
	}
	return d
}

// Port returns a free port of 127.0.0.1, below those that systems choose themselves.
func Port(t testing.TB) int {
	t.Helper()
	for range 100 {
		port := 20000 + rand.IntN(10000)
		if ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			ln.Close()
			return port
		}
	}
	t.Fatal("100 ports tried, none is free")
	return 0
}

// Dir returns a new directory that a handoff may be in: its path is short.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A Process is an example that runs.
type Process struct {
	t     testing.TB
	cmd   *exec.Cmd
	ended chan struct{}

	mu    sync.Mutex
	said  []string      // guarded by mu; its standard output and error
	heard int           // guarded by mu; lines that Hear has returned or passed over
	more  chan struct{} // guarded by mu; closed with the next line
}

// Command is the example as a command that Run starts.
func Command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exec.Command(exe, args...)
}

// Start starts the example.
func Start(t testing.TB, args ...string) *Process {
	t.Helper()
	return Run(t, Command(t, args...))
}

// Run starts a command, which ends with the test at the latest.
func Run(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{t: t, cmd: cmd, ended: make(chan struct{}), more: make(chan struct{})}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, Variable+"="+watched)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = Limit(20 * time.Second) // for what it has started itself
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for in := bufio.NewScanner(r); in.Scan(); {
			p.mu.Lock()
			p.said = append(p.said, in.Text())
			close(p.more)
			p.more = make(chan struct{})
			p.mu.Unlock()
		}
	}()
	go func() {
		cmd.Wait()
		w.Close()
		<-read
		stdin.Close()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.Signal(os.Kill)
		<-p.ended
		if t.Failed() {
			t.Logf("process %d (%v) said:\n%s", cmd.Process.Pid, cmd.ProcessState, strings.Join(p.Said(), "\n"))
		}
	})
	return p
}

// Pid is the number of the process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Hear waits for the next line that begins with prefix, and returns how it goes on.
func (p *Process) Hear(prefix string) string {
	p.t.Helper()
	return p.HearWithin(prefix, Limit(30*time.Second))
}

// HearWithin is Hear with a time limit.
func (p *Process) HearWithin(prefix string, most time.Duration) string {
	p.t.Helper()
	timeout := time.After(most)
	for {
		p.mu.Lock()
		for p.heard < len(p.said) {
			line := p.said[p.heard]
			p.heard++
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				p.mu.Unlock()
				return rest
			}
		}
		more := p.more
		p.mu.Unlock()
		select {
		case <-more:
		case <-p.ended:
			p.t.Fatalf("process %d ended (%v) and did not say %q", p.Pid(), p.cmd.ProcessState, prefix)
		case <-timeout:
			p.t.Fatalf("process %d does not say %q", p.Pid(), prefix)
		}
	}
}

// Said returns all lines up to now.
func (p *Process) Said() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.said)
}

// Signal sends a signal, unless the process has ended.
func (p *Process) Signal(sig os.Signal) { p.cmd.Process.Signal(sig) }

// Wait waits until the process has ended, and returns how.
func (p *Process) Wait() *os.ProcessState {
	p.t.Helper()
	select {
	case <-p.ended:
		return p.cmd.ProcessState
	case <-time.After(Limit(60 * time.Second)):
		p.t.Fatalf("process %d does not end", p.Pid())
		return nil
	}
}

// Stop sends a signal and waits until the process has ended without an error.
func (p *Process) Stop(sig os.Signal) {
	p.t.Helper()
	p.Signal(sig)
	if state := p.Wait(); !state.Success() {
		p.t.Fatalf("process %d was to stop and ended with %v", p.Pid(), state)
	}
}

// Load is HTTP clients, each of which sends one request after the other. The odd
// ones open a connection for each, the even ones keep theirs. (http.Client repeats
// a GET by itself if a connection that it had kept turns out to be closed.)
type Load struct {
	t    testing.TB
	stop chan struct{}
	all  sync.WaitGroup

	mu       sync.Mutex
	answered int
	by       map[string]int // answers
	failed   []error
}

// StartLoad lets n clients loose on url. Each has a transport of its own.
func StartLoad(t testing.TB, n int, url string, transport func() *http.Transport) *Load {
	l := &Load{t: t, stop: make(chan struct{}), by: make(map[string]int)}
	for i := range n {
		tr := transport()
		tr.DisableKeepAlives = i%2 == 1
		l.all.Add(1)
		go l.client(&http.Client{Transport: tr, Timeout: Limit(20 * time.Second)}, url)
	}
	t.Cleanup(func() { l.End() })
	return l
}

func (l *Load) client(c *http.Client, url string) {
	defer l.all.Done()
	defer c.CloseIdleConnections()
	for {
		select {
		case <-l.stop:
			return
		default:
		}
		body, err := Get(c, url)
		l.mu.Lock()
		if err == nil {
			l.answered++
			l.by[body]++
		} else {
			l.failed = append(l.failed, err)
		}
		l.mu.Unlock()
		if err != nil {
			time.Sleep(10 * time.Millisecond) // so as not to spin while nobody listens
		}
	}
}

// Await waits for n more answers.
func (l *Load) Await(n int) {
	l.t.Helper()
	l.mu.Lock()
	n += l.answered
	l.mu.Unlock()
	for deadline := time.Now().Add(Limit(60 * time.Second)); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		answered, failed := l.answered, len(l.failed)
		l.mu.Unlock()
		if answered >= n {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%d answers and %d failures, waiting for %d answers", answered, failed, n)
		}
	}
}

// End lets every client finish its request, and returns how many were answered and
// by whom, and the failures.
func (l *Load) End() (answered int, by map[string]int, failed []error) {
	l.mu.Lock()
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.mu.Unlock()
	l.all.Wait()
	return l.answered, l.by, l.failed
}

// Get returns the body of an answer with status 200.
func Get(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the answer is %s: %s", resp.Status, body)
	}
	return strings.TrimSpace(string(body)), err
}

// Standing opens n connections to addr, each with a request that waits for an answer.
func Standing(t testing.TB, addr string, n int) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			err = c.SetDeadline(time.Now().Add(Limit(30 * time.Second)))
		}
		if err == nil {
			_, err = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		}
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c
	}
	return conns
}

// Answers reads the answer of each connection.
func Answers(t testing.TB, conns []net.Conn) (answers []string) {
	t.Helper()
	for i, c := range conns {
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("connection %d of %d: %v", i, len(conns), err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("connection %d of %d: %s, %v", i, len(conns), resp.Status, err)
		}
		answers = append(answers, strings.TrimSpace(string(body)))
	}
	return answers
}
