//go:build unix && !aix

package lblisten

// The handoff as its user sees it: processes start, end, are killed and stopped.

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The review's experiment: processes with four listeners each that stand still,
// 2000 connections, some of the processes end, and what is left accepts.
func TestHandoffExperiment(t *testing.T) {
	kill := func(s *server) { s.signal(syscall.SIGKILL) }
	for _, c := range []struct {
		name      string
		processes int
		dead      []int
		die       func(s *server)
	}{
		{"SIGKILL of the first, of two", 2, []int{0}, kill},
		{"SIGKILL of the other", 2, []int{1}, kill},
		{"SIGTERM", 2, []int{1}, func(s *server) { s.signal(syscall.SIGTERM) }},
		{"panic", 2, []int{0}, func(s *server) { fmt.Fprintln(s.in, "panic") }},
		{"close", 2, []int{0}, func(s *server) { s.ask("close"); s.in.Close() }},
		{"SIGKILL of the first, of three", 3, []int{0}, kill},
		{"SIGKILL of two of three", 3, []int{0, 1}, kill},
		{"SIGKILL of two of eight", 8, []int{0, 5}, kill},
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
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				n := queued(count(2000, 100), queues(dispatcher, 4*c.processes))
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
					a, b := servers[0].ask("report"), servers[1].ask("report")
					return serverReport{Sockets: max(a.Sockets, b.Sockets), Goroutines: max(a.Goroutines, b.Goroutines), Descriptors: max(a.Descriptors, b.Descriptors)}
				}
				for _, s := range servers {
					s.becomes(isHandedOff)
				}
				first := most()
				d := startLoad(4, "tcp", job.Address)
				restarts := races(count(50, 4), 12)
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

// A process that is killed the moment its Listen has returned leaves its queue to the
// others, also if the system has chosen the port.
func TestHandoffKilledAtOnce(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 1}
		startServer(t, job) // elsewhere
		for range races(count(20, 4), 5) {
			s := startServer(t, job)
			c := standing(t, s.Address, 1)
			s.kill()
			next := job
			next.Address, next.Accept = s.Address, true
			s = startServer(t, next)
			require.Equal(t, 1, answered(c))
			c[0].Close()
			s.kill()
		}
	})
}

// Processes that start at the same instant are one set, whoever binds first, and
// so they are after many of them died in one instant.
func TestHandoffStartAndDieTogether(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 1, Dispatcher: dispatcher}
		if !dispatcher {
			job.Members = 2
		}
		first := startServer(t, job)
		job.Address = first.Address
		n := races(count(24, 6), 8)
		for range races(count(3, 1), 1) {
			servers := make([]*server, n)
			for i := range servers {
				servers[i] = beginServer(t, job)
			}
			for _, s := range servers {
				s.hear()
				require.Empty(t, s.Err)
			}
			for _, s := range append(servers, first) {
				s.becomes(isHandedOff)
			}
			conns := standing(t, job.Address, queued(count(400, 40), queues(dispatcher, 2*n)))
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

// A stopped process delays nobody: the others accept, close and join within a second
// or so, and what is queued at the stopped one is served by them. When it goes on, its
// sockets are its own again.
func TestHandoffStoppedProcess(t *testing.T) {
	beside(t)
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
		own := servers[0].Sockets
		stopped, other := servers[0], servers[2]
		n := queued(count(600, 60), queues(dispatcher, 12))
		conns := standing(t, job.Address, n)
		stopped.signal(syscall.SIGSTOP)
		servers[1].ask("accept")
		other.ask("accept")
		begin := time.Now()
		require.Equal(t, n, answered(conns))
		t.Logf("%d tried, 0 lost; those in the stopped process's queue too were served after %v", n, time.Since(begin))
		r := other.ask("close one")
		require.Less(t, r.Took, limit(2*time.Second))
		newcomer := startServer(t, job)
		require.Less(t, newcomer.Took, limit(4*time.Second))
		newcomer.ask("accept")
		more := standing(t, job.Address, n)
		require.Equal(t, n, answered(more))

		stopped.signal(syscall.SIGCONT)
		servers = append(servers, newcomer)
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		conns = append(conns, more...)
		for _, c := range conns {
			c.Close()
		}
		stopped.ask("accept")
		if !dispatcher { // whoever served its sockets doesn't any more
			for _, s := range servers[1:] {
				s.becomes(func(r serverReport) bool { return r.Sockets <= own+1 })
			}
		}
		more = standing(t, job.Address, n)
		require.Equal(t, n, answered(more))
		for _, s := range servers {
			r := s.ask("close")
			require.Less(t, r.Took, limit(2*time.Second))
		}
	})
}

// One process closes in the instant in which another dies: the third one keeps
// everything.
func TestHandoffOneDiesWhileAnotherCloses(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		for round := range races(count(30, 4), 12) {
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

// What a killed process leaves in its queue is answered by another one of the
// handoff; how soon is only said, not judged.
func TestHandoffTimeToInherit(t *testing.T) {
	beside(t)
	if os.Geteuid() == 0 {
		t.Skip("root: TestUnprivileged runs it as another user")
	}
	modes[0].need(t)
	noLeaks(t)
	var took []time.Duration
	tried, lost := 0, 0
	for range races(count(40, 6), 10) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 1}
		dead := startServer(t, job)
		job.Address = dead.Address
		heir := startServer(t, job)
		dead.becomes(isHandedOff)
		heir.becomes(isHandedOff)
		heir.ask("accept")
		conns := standing(t, job.Address, 16)
		var queued []net.Conn
		for _, ch := range hears(conns, 40*time.Millisecond) {
			if r := <-ch; r.err != nil {
				queued = append(queued, r.c)
			}
		}
		begin := time.Now()
		dead.signal(syscall.SIGKILL)
		fastest := time.Hour
		for _, ch := range hears(queued, 10*time.Second) {
			tried++
			if r := <-ch; r.err != nil {
				lost++
			} else {
				fastest = min(fastest, r.at.Sub(begin))
			}
		}
		if len(queued) > 0 {
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

// The end is an end: with the last process of an address everything closes, and
// when it is killed, what is queued is kept for the next one for a while.
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

		// Killed, the next one on the address gets what is queued.
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
		if dispatcher { // b has the socket, and has asked nothing that this process had to answer after hearing so
			soon(t, is(true))
		}
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

// What doesn't fit is refused with both named.
func TestHandoffConflicts(t *testing.T) {
	beside(t)
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

// A process that is short of descriptors doesn't take the sockets of another, whose Info
// says so at once; it takes them when it has descriptors again.
func TestHandoffOutOfDescriptors(t *testing.T) {
	beside(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 60}
	a := startServer(t, job)
	b := startServer(t, serverJob{Path: job.Path, Address: a.Address, Members: 4, Files: 50})
	require.True(t, isHandedOff(b.serverReport), "the other has descriptors: %v", b.Reason)
	r := a.ask("report")
	require.False(t, isHandedOff(r))
	require.Contains(t, r.Reason, "the handoff "+job.Path+": the others don't have every socket of this process: they are short of descriptors")
	b.ask("files")
	b.ask("accept")
	a.becomes(isHandedOff)
	conns := standing(t, a.Address, count(200, 50))
	a.kill()
	require.Equal(t, len(conns), answered(conns))
}

// A process that has no descriptor left can be taken over from, whether the other one
// was there before or comes then.
func TestHandoffFromAProcessWithoutDescriptors(t *testing.T) {
	beside(t)
	needKeptQueue(t) // of its unix socket too
	for _, before := range []bool{true, false} {
		t.Run(map[bool]string{true: "full when there are two", false: "full before the other comes"}[before], func(t *testing.T) {
			beside(t)
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher}
				full := startServer(t, job)
				job.Address = full.Address
				var other *server
				if before {
					other = startServer(t, job)
				}
				full.ask("full")
				n := queued(count(100, 20), 1)
				conns := standing(t, job.Address, n)
				if !before {
					other = startServer(t, job)
				}
				full.becomes(isHandedOff)
				full.kill()
				other.ask("accept")
				require.Equal(t, n, answered(conns))
			})
		})
	}
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
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	path := handoffPath(t)
	_, ls := newTestGroup(t, 1, "tcp", "127.0.0.1:0", WithHandoff(path), WithLogger(logger))
	require.True(t, says("a socket is deposited")())
	b := startServer(t, serverJob{Path: path, Address: ls[0].Addr().String(), Members: 1})
	require.Eventually(t, says("a process joined the handoff"), limit(5*time.Second), time.Millisecond)
	b.kill()
	require.Eventually(t, says("a process left the handoff"), limit(5*time.Second), time.Millisecond)
	require.Eventually(t, says("this process serves a socket that nobody else is known to accept from"), limit(5*time.Second), time.Millisecond)
	require.NoError(t, joinTest(t, ls[0], WithHandoff(path), WithLogger(logger)).Close())
	require.True(t, says("a new member adopted the socket")())
	require.True(t, says("members left, siblings have their sockets")())
	require.True(t, says("address="+ls[0].Addr().String())())
}
