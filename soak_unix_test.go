//go:build unix && !aix

package lblisten

// The soak of processes with a handoff: they start, close, are killed and
// stopped at random under load, their listeners come and go, and a model says
// what each client may see. What a killed process had accepted is found out from
// outside: on Linux it is stopped first, in whatever it does at that moment, and
// the kernel is asked for its connections before it is killed; elsewhere it is
// killed while it accepts nothing and has answered everybody.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lblisten/lblisten/internal/joining"
)

// A soakServer is what soakWorker has.
type soakServer struct {
	opts                  []Option
	listeners             []*Listener
	accepting, unanswered sync.WaitGroup

	mu     sync.Mutex
	cond   sync.Cond // what follows has changed
	held   bool
	parked int
}

// soakWorker listens, accepts and obeys, a word a line, each of which is
// answered by a report.
func soakWorker() {
	var job serverJob
	must(json.Unmarshal([]byte(os.Getenv("LBLISTEN_TEST_JOB")), &job))
	s := &soakServer{opts: []Option{WithHandoff(job.Path)}}
	s.cond.L = &s.mu
	if job.Dispatcher {
		s.opts = append(s.opts, WithDispatcher())
	}
	out := json.NewEncoder(os.Stdout)
	g, err := ListenGroup(context.Background(), job.Network, job.Address, job.Members, s.opts...)
	if err != nil {
		out.Encode(serverReport{Err: err.Error()})
		return
	}
	for _, l := range g.Listeners() {
		s.start(l)
	}
	report := func(err error) {
		info := s.listeners[0].Info()
		r := serverReport{Address: g.Addr().String(), Members: info.Members, Sockets: info.Sockets, OnClose: info.OnClose, OnKill: info.OnKill}
		if info.Reason != nil {
			r.Reason = info.Reason.Error()
		}
		if err != nil {
			r.Err = err.Error()
		}
		must(out.Encode(r))
	}
	report(nil)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var err error
		switch in.Text() {
		case "hold":
			s.hold()
		case "go on":
			s.goOn()
		case "full":
			err = setFileLimit(openDescriptors()) // nothing more can be opened
		case "files":
			err = setFileLimit(1024)
		case "join":
			var ln net.Listener
			if ln, err = Listen(job.Network, g.Addr().String(), s.opts...); err == nil {
				s.start(ln.(*Listener))
			}
		case "leave":
			if n := len(s.listeners); n > 1 {
				err = s.listeners[n-1].Close()
				s.listeners = s.listeners[:n-1]
				s.wake()
			}
		case "close":
			for _, l := range s.listeners {
				err = errors.Join(err, l.Close())
			}
			s.wake()
			report(err)
			s.accepting.Wait()
			s.unanswered.Wait()
			return
		}
		report(err)
	}
}

func (s *soakServer) start(l *Listener) {
	s.listeners = append(s.listeners, l)
	if s.held {
		must(l.SetDeadline(longPast))
	}
	s.accepting.Add(1)
	go func() {
		defer s.accepting.Done()
		for {
			c, err := l.Accept()
			switch {
			case err == nil:
				s.unanswered.Add(1)
				go func() {
					echoNumber(c, func(uint64) {}, s.unanswered.Done)
				}()
			case errors.Is(err, net.ErrClosed):
				return
			case errors.Is(err, os.ErrDeadlineExceeded):
				s.park(l)
			case errors.Is(err, unix.EMFILE):
				time.Sleep(time.Millisecond)
			default:
				must(fmt.Errorf("accept: %w", err))
			}
		}
	}()
}

// park is where an accept loop stands while the server is held.
func (s *soakServer) park(l *Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parked++
	s.cond.Broadcast()
	for s.held && l.Info().Members > 0 {
		s.cond.Wait()
	}
	s.parked--
}

func (s *soakServer) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cond.Broadcast()
}

// hold returns when nobody accepts, and everybody is answered who was accepted.
func (s *soakServer) hold() {
	s.mu.Lock()
	s.held = true
	s.mu.Unlock()
	for _, l := range s.listeners {
		must(l.SetDeadline(longPast))
	}
	s.mu.Lock()
	for s.parked < len(s.listeners) {
		s.cond.Wait()
	}
	s.mu.Unlock()
	s.unanswered.Wait()
}

func (s *soakServer) goOn() {
	for _, l := range s.listeners {
		must(l.SetDeadline(time.Time{}))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = false
	s.cond.Broadcast()
}

// soakProcesses is how many processes there are at the most.
const soakProcesses = 5

// planProcesses is the plan of a round with processes. At any time one lives that
// isn't about to end, or a keeper does, which is stopped, goes on and is replaced by
// another. While a process is stopped nobody starts.
func planProcesses(r *rand.Rand, keeper bool) (plan []operation) {
	var lives, held [soakProcesses]bool
	add := func(do string, on, n int) {
		wait := time.Duration(0)
		if r.IntN(2) == 0 {
			wait = time.Duration(r.IntN(30_000)) * time.Microsecond
		}
		plan = append(plan, operation{do, on, n, wait})
	}
	start := func(on int) {
		add("start", on, 1+r.IntN(3))
		lives[on], held[on] = true, false
	}
	living := func() (n int) {
		for _, l := range lives {
			if l {
				n++
			}
		}
		return n
	}
	ends := []string{"kill", "kill", "kill held", "terminate", "close", "close"}
	mayGo := func() bool { return keeper || living() > 1 }
	start(0)
	start(1)
	add("load", 0, 1+r.IntN(5))
	for range 15 + r.IntN(25) {
		on := r.IntN(soakProcesses)
		switch what := r.IntN(22); {
		case what < 1:
			add("load", 0, r.IntN(6))
		case what < 4:
			add("burst", 0, 1+r.IntN(size(60, 5)))
		case !lives[on] || living() == 0:
			start(on)
		case what < 5 && keeper:
			if r.IntN(2) == 0 {
				add("replace the keeper", 0, 0)
			} else {
				add("stop the keeper", 0, r.IntN(300))
			}
		case what < 6:
			add("join", on, 0)
		case what < 8:
			add("leave", on, 0)
		case what < 9:
			add("full", on, 0)
			for range r.IntN(3) {
				add("burst", 0, 1+r.IntN(size(60, 5)))
			}
			add("files", on, 0)
		case what < 10:
			add("flood", 0, 1+r.IntN(30))
		case what < 12:
			add(map[bool]string{false: "hold", true: "go on"}[held[on]], on, 0)
			held[on] = !held[on]
		case what < 14:
			most := 300
			if r.IntN(8) == 0 {
				most = 4000 // longer than silentAfter
			}
			add("stop", on, 0)
			for range r.IntN(4) {
				add("burst", 0, 1+r.IntN(size(60, 5)))
			}
			if other := r.IntN(soakProcesses); other != on && lives[other] && living() > 2 && r.IntN(2) == 0 {
				add("if it may: "+ends[r.IntN(len(ends))], other, 0)
				lives[other] = false // or not: then it isn't started again
				add("burst", 0, 1+r.IntN(size(60, 5)))
			}
			if mayGo() && r.IntN(4) == 0 {
				add("kill", on, 0)
				lives[on] = false
			} else {
				plan = append(plan, operation{"continue", on, 0, limit(time.Duration(r.IntN(most)) * time.Millisecond)})
			}
		case mayGo():
			add(ends[r.IntN(len(ends))], on, 0)
			lives[on] = false
			if other := r.IntN(soakProcesses); lives[other] && mayGo() && r.IntN(2) == 0 {
				plan[len(plan)-1].n = 1 + other
				add("together: "+ends[r.IntN(len(ends))], other, 0) // without waiting for anything
				lives[other] = false
			}
		}
	}
	if living() == 0 {
		start(0)
	}
	return plan
}

// processes is a round of the soak with processes.
type processes struct {
	t        *testing.T
	job      serverJob
	servers  [soakProcesses]*server
	ended    []*server
	stopped  *server
	keeper   *server // nil for none
	clients  clients
	history  history
	kills    int
	accepted int // connections that killed processes had accepted

	mu   sync.Mutex
	died map[int][]time.Time // by the client's port: when a process was killed that had accepted it
}

func (ps *processes) start(o operation) {
	self, err := os.Executable()
	require.NoError(ps.t, err)
	job := ps.job
	job.Members = o.n
	b, err := json.Marshal(job)
	require.NoError(ps.t, err)
	s := &server{t: ps.t, cmd: exec.Command(self)}
	s.cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=soak", "LBLISTEN_TEST_JOB="+string(b), "GORACE=atexit_sleep_ms=0")
	s.cmd.Stderr = os.Stderr
	s.in, err = s.cmd.StdinPipe()
	require.NoError(ps.t, err)
	out, err := s.cmd.StdoutPipe()
	require.NoError(ps.t, err)
	s.out = json.NewDecoder(out)
	require.NoError(ps.t, s.cmd.Start())
	ps.t.Cleanup(s.end)
	s.hear()
	require.Empty(ps.t, s.Err)
	ps.servers[o.on] = s
	ps.job.Address = s.Address
}

// end ends a process: what it leaves must come out of another one.
func (ps *processes) end(how string, on int, stopped bool) {
	s := ps.servers[on]
	ps.servers[on] = nil
	ps.ended = append(ps.ended, s)
	switch how {
	case "close":
		fmt.Fprintln(s.in, "close")
		return
	case "terminate", "kill held":
		s.ask("hold")
	case "kill":
		if runtime.GOOS != "linux" {
			if stopped {
				s.signal(syscall.SIGCONT)
			}
			s.ask("hold")
			break
		}
		if !stopped {
			ps.stop(s)
		}
		ports, err := clientsOf(s.cmd.Process.Pid, portOf(ps.job.Address))
		require.NoError(ps.t, err)
		ps.mu.Lock()
		for port := range ports {
			ps.died[port] = append(ps.died[port], time.Now())
		}
		ps.mu.Unlock()
		ps.accepted += len(ports)
	}
	ps.kills++
	sig := syscall.SIGKILL
	if how == "terminate" {
		sig = syscall.SIGTERM
	}
	s.signal(sig)
}

// stop stops a process, and returns when all its threads stand still.
func (ps *processes) stop(s *server) {
	s.signal(syscall.SIGSTOP)
	var status unix.WaitStatus
	_, err := unix.Wait4(s.cmd.Process.Pid, &status, unix.WUNTRACED, nil)
	for err == unix.EINTR {
		_, err = unix.Wait4(s.cmd.Process.Pid, &status, unix.WUNTRACED, nil)
	}
	require.NoError(ps.t, err)
	// Stopped doesn't know SIGSTOP on BSD.
	require.True(ps.t, byte(status)&0x7f == 0x7f, "a server ended: %v", status)
}

// excuse: a client may fail whose connection had been accepted by a process that
// was killed then.
func (ps *processes) excuse(c *soakClient) *atomic.Int64 {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, at := range ps.died[c.port] {
		if at.After(c.begin) && at.Before(c.end) {
			return &ps.clients.died
		}
	}
	if joining.TurnedAway(c.err) {
		return &ps.clients.ended
	}
	return nil
}

func (ps *processes) obey(o operation) {
	if ps.clients.obey(o) {
		return
	}
	s := ps.servers[o.on]
	switch o.do {
	case "start":
		if s == nil {
			ps.start(o)
		}
	case "replace the keeper":
		before := ps.keeper
		ps.keeper = startKeeper(ps.t, ps.job.Path, 0)
		before.signal(syscall.SIGTERM)
		before.wait()
	case "stop the keeper":
		ps.keeper.signal(syscall.SIGSTOP)
		time.Sleep(limit(time.Duration(o.n) * time.Millisecond))
		ps.keeper.signal(syscall.SIGCONT)
	case "stop":
		ps.stop(s)
		ps.stopped = s
	case "continue":
		s.signal(syscall.SIGCONT)
		ps.stopped = nil
	case "flood":
		ps.flood(o.n)
	case "hold", "go on", "join", "leave", "full", "files":
		if o.do == "full" && keptQueue(ps.t) != "kept\n" {
			return // accept(2) loses connections then
		}
		r := s.ask(o.do)
		require.Empty(ps.t, r.Err, o.do)
	default:
		how, together := strings.CutPrefix(o.do, "together: ")
		how, may := strings.CutPrefix(how, "if it may: ")
		switch {
		case may && !isHandedOff(s.ask("report")):
			return // nobody would take over: all others are stopped
		case !together && !may && ps.stopped != s:
			// What Info promises holds from here on, for who goes next too.
			s.becomes(isHandedOff)
			if o.n > 0 {
				ps.servers[o.n-1].becomes(isHandedOff)
			}
		}
		stopped := ps.stopped == s
		if stopped {
			ps.stopped = nil
		}
		ps.end(how, o.on, stopped)
	}
}

// flood has somebody of this user open n links to each process, say nonsense or nothing
// at all, and go.
func (ps *processes) flood(n int) {
	ids, err := processesIn(ps.job.Path)
	require.NoError(ps.t, err)
	for _, x := range ids {
		for i := range n {
			c, err := net.Dial("unix", filepath.Join(ps.job.Path, x.String()))
			if err != nil {
				break // it is gone, or its backlog is full
			}
			defer c.Close()
			if i%2 == 0 {
				c.Write(bytes.Repeat([]byte{byte(i), 0xff, 0}, 1+i))
			}
		}
	}
}

// run does a round and returns what was wrong.
func (ps *processes) run(plan []operation, keeper bool) error {
	ps.clients.excuse = ps.excuse
	if keeper {
		ps.keeper = startKeeper(ps.t, ps.job.Path, 0)
		defer func() { ps.keeper.end() }()
	}
	for _, o := range plan {
		time.Sleep(o.wait)
		ps.history.add(o)
		ps.obey(o)
		if ps.clients.address == "" {
			ps.clients.network, ps.clients.address = "tcp", ps.job.Address
		}
	}
	ps.history.add(operation{do: "end"})
	for _, s := range ps.servers {
		if s != nil {
			s.ask("go on")
		}
	}
	ps.clients.wait()
	for on, s := range ps.servers {
		if s != nil {
			ps.end("close", on, false)
		}
	}
	for _, s := range ps.ended {
		s.in.Close()
		s.wait()
		if state := s.cmd.ProcessState; state.Exited() && !state.Success() {
			return fmt.Errorf("a server ended with %v", state) // a race, or a panic
		}
	}
	if n := ps.clients.lost.Load(); n > 0 {
		return fmt.Errorf("%d clients are lost, the first: %w", n, *ps.clients.firstErr.Load())
	}
	return nil
}

func portOf(address string) int {
	_, port, _ := net.SplitHostPort(address)
	n, _ := strconv.Atoi(port)
	return n
}

// clientsOf returns the ports of the clients whose connections a process has
// accepted on its port. Linux's kernel tells.
func clientsOf(pid, port int) (map[int]bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	own := make(map[string]bool)
	for _, f := range files {
		if to, err := os.Readlink(filepath.Join(dir, f.Name())); err == nil {
			own[to] = true
		}
	}
	ports := make(map[int]bool)
	for range 2 { // lines can be passed over while others go
		b, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			return nil, err
		}
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line)
			if len(f) < 10 || !own["socket:["+f[9]+"]"] || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				continue
			}
			if n, err := strconv.ParseUint(f[2][len(f[2])-4:], 16, 16); err == nil && n != 0 {
				ports[int(n)] = true
			}
		}
	}
	return ports, nil
}

// Processes with a handoff start, close, are killed, stopped and held in any
// order, alone and two at a time, under load, while their listeners come and go, they
// run out of descriptors, and somebody floods them with links: each client is served, unless a process had accepted it and was killed then.
func TestHandoffSoak(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		var sum totals
		kills, accepted := 0, 0
		soakRounds(t, period(5*time.Second), 1, func(seed uint64) {
			keeper := seed%2 == 0
			plan := planProcesses(rand.New(rand.NewPCG(seed, 1)), keeper)
			ps := &processes{t: t, died: make(map[int][]time.Time),
				job: serverJob{Path: handoffPath(t), Network: "tcp4", Address: "127.0.0.1:0", Dispatcher: dispatcher}}
			var err error
			done := false
			defer func() {
				if !done { // a require has failed
					t.Logf("seed %d after\n%s", seed, &ps.history)
				}
			}()
			ps.history.watch(seed, func() { err = ps.run(plan, keeper) })
			done = true
			sum.add(&ps.clients, len(plan))
			kills, accepted = kills+ps.kills, accepted+ps.accepted
			if err != nil {
				t.Errorf("seed %d: %v\nafter\n%s", seed, err, &ps.history)
			}
		})
		t.Logf("%v; %d processes killed, which had accepted %d connections then", &sum, kills, accepted)
	})
}
