//go:build unix && !aix

package lblisten

// The keeper, and what an observer sees.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/internal/keeper"
	"github.com/stretchr/testify/require"
)

// startChild starts a worker that is ended by signals, and returns the first line that
// it prints. It is killed with the test at the latest.
func startChild(t testing.TB, name string, env ...string) (s *server, line string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	s = &server{t: t, cmd: exec.Command(self)}
	s.cmd.Env = append(append(os.Environ(), "LBLISTEN_TEST_WORKER="+name, "GORACE=atexit_sleep_ms=0"), env...)
	s.cmd.Stderr = os.Stderr
	s.in, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := s.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(s.end)
	line, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "a worker ended")
	return s, strings.TrimSpace(line)
}

// startKeeper starts a process that keeps a path, for a while or for ever.
func startKeeper(t testing.TB, path string, while time.Duration) *server {
	t.Helper()
	s, line := startChild(t, "keeper", "LBLISTEN_TEST_PATH="+path, "LBLISTEN_TEST_WHILE="+while.String())
	require.Equal(t, "keeps", line)
	return s
}

// keeperWorker keeps a path until SIGTERM.
func keeperWorker() {
	path := os.Getenv("LBLISTEN_TEST_PATH")
	while, err := time.ParseDuration(os.Getenv("LBLISTEN_TEST_WHILE"))
	must(err)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		for {
			handoffs.mu.Lock()
			h := handoffs.m[path]
			handoffs.mu.Unlock()
			if h != nil {
				h.mu.Lock()
				keeps := h.keepers > 0 && h.settled
				h.mu.Unlock()
				if keeps {
					fmt.Println("keeps")
					return
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if while == 0 {
		must(Keep(ctx, path))
	} else {
		must(keep(ctx, path, while, nil))
	}
}

// webWorker is an HTTP server of one process, which ends by SIGTERM as one should: it
// answers what it has accepted before Shutdown, which closes a connection whose request
// is read only then.
func webWorker() {
	opts := []Option{WithHandoff(os.Getenv("LBLISTEN_TEST_PATH"))}
	if os.Getenv("LBLISTEN_TEST_DISPATCHER") != "" {
		opts = append(opts, WithDispatcher())
	}
	ln, err := Listen("tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), opts...)
	must(err)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })}
	var mu sync.Mutex
	unanswered := make(map[net.Conn]bool)
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		if state == http.StateNew || state == http.StateActive {
			unanswered[c] = true
		} else {
			delete(unanswered, c)
		}
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	fmt.Println(ln.Addr())
	go func() {
		<-term
		ln.Close() // who is queued is the next one's
	}()
	if err := srv.Serve(ln); !errors.Is(err, net.ErrClosed) {
		must(err)
	}
	srv.SetKeepAlivesEnabled(false)
	for left := 1; left > 0; time.Sleep(time.Millisecond) {
		mu.Lock()
		left = len(unanswered)
		mu.Unlock()
	}
	must(srv.Shutdown(context.Background()))
}

// A service of one process is stopped and then started, 20 times, under HTTP requests
// with keep-alive and without: with a keeper no request fails, but those that a killed
// process had.
func TestKeeperStopStart(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		path := handoffPath(t)
		startKeeper(t, path, 0)
		env := []string{"LBLISTEN_TEST_PATH=" + path}
		if dispatcher {
			env = append(env, "LBLISTEN_TEST_DISPATCHER=1")
		}
		web, address := startChild(t, "web", append(env, "LBLISTEN_TEST_ADDRESS=127.0.0.1:0")...)
		env = append(env, "LBLISTEN_TEST_ADDRESS="+address)
		var wg sync.WaitGroup
		var stop atomic.Bool
		var requests, failed, killed atomic.Int64
		var longest atomic.Int64
		var killing sync.RWMutex // held by whoever kills: what fails meanwhile died with the process
		var kills atomic.Int64
		for i := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				tr := &http.Transport{DisableKeepAlives: i%2 == 0}
				defer tr.CloseIdleConnections()
				client := &http.Client{Transport: tr, Timeout: limit(20 * time.Second)}
				for !stop.Load() {
					killing.RLock()
					before := kills.Load()
					killing.RUnlock()
					begin := time.Now()
					resp, err := client.Get("http://" + address)
					if err == nil {
						_, err = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
					}
					killing.RLock()
					died := kills.Load() != before
					killing.RUnlock()
					requests.Add(1)
					longest.Store(max(longest.Load(), int64(time.Since(begin))))
					switch {
					case err != nil && died:
						killed.Add(1)
					case err != nil:
						failed.Add(1)
						t.Log(err)
					}
					time.Sleep(time.Millisecond)
				}
			}()
		}
		rounds := races(count(20, 4), 6)
		for i := range rounds {
			time.Sleep(limit(20 * time.Millisecond))
			if i%2 == 0 {
				web.signal(syscall.SIGTERM)
				web.wait()
				require.True(t, web.cmd.ProcessState.Success(), "%v", web.cmd.ProcessState)
			} else {
				killing.Lock()
				kills.Add(1)
				web.kill()
				killing.Unlock()
			}
			time.Sleep(limit(20 * time.Millisecond)) // nobody is there
			web, _ = startChild(t, "web", env...)
		}
		time.Sleep(limit(20 * time.Millisecond))
		stop.Store(true)
		wg.Wait()
		t.Logf("%d times: %d tried, %d lost, %d died with a process; the longest took %v", rounds, requests.Load(), failed.Load(), killed.Load(), time.Duration(longest.Load()).Round(time.Millisecond))
		require.Zero(t, failed.Load())
		require.LessOrEqual(t, killed.Load(), 8*kills.Load())
	})
}

// Without a keeper the queue of the last process is reset, and who comes before the next
// one is refused.
func TestNoKeeper(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher}
		a := startServer(t, job)
		conns := standing(t, a.Address, 20)
		require.False(t, isHandedOff(a.ask("report")))
		require.Contains(t, a.Reason, "no keeper runs: start a second one, or lbkeep "+job.Path)
		a.close()
		_, err := dialOnce("tcp", a.Address)
		require.True(t, isRefused(err), "%v", err)
		job.Address, job.Accept = a.Address, true
		startServer(t, job)
		require.Zero(t, answered(conns))
	})
}

// While a keeper lives nothing is lost, in whatever order processes end, all of them at
// once too; Info says so of a lone process. Keepers take over from each other.
func TestKeeperKeeps(t *testing.T) {
	beside(t)
	kill := func(s *server) { s.signal(syscall.SIGKILL) }
	ends := map[string]func(s *server){
		"killed":     kill,
		"terminated": func(s *server) { s.signal(syscall.SIGTERM) },
		"closed":     func(s *server) { s.ask("close"); s.in.Close() },
		"stopped and killed": func(s *server) {
			s.signal(syscall.SIGSTOP)
			kill(s)
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			beside(t)
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
				keeper := startKeeper(t, job.Path, 0)
				var conns []net.Conn
				tried := 0
				for round := range races(count(3, 2), 2) {
					var servers []*server
					for range 1 + round%2 {
						s := startServer(t, job)
						job.Address = s.Address
						servers = append(servers, s)
					}
					for _, s := range servers {
						s.becomes(isHandedOff)
					}
					conns = append(conns, standing(t, job.Address, 30)...)
					for _, s := range servers {
						end(s)
					}
					for _, s := range servers {
						s.wait()
					}
					conns = append(conns, standing(t, job.Address, 30)...) // nobody is there
					if round == 1 {
						next := startKeeper(t, job.Path, 0)
						keeper.signal(syscall.SIGTERM)
						keeper.wait()
						keeper = next
					}
				}
				next := job
				next.Accept = true
				s := startServer(t, next)
				s.becomes(isHandedOff)
				tried = len(conns)
				served := answered(conns)
				t.Logf("%d tried, %d lost", tried, tried-served)
				require.Equal(t, tried, served)
				for _, c := range conns {
					c.Close()
				}
			})
		})
	}
}

// A keeper for a while lets go of an address without processes then.
func TestKeeperForAWhile(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
		startKeeper(t, job.Path, limit(2*time.Second))
		s := startServer(t, job)
		s.becomes(isHandedOff)
		conns := standing(t, s.Address, 10)
		s.kill()
		conns = append(conns, standing(t, s.Address, 10)...)
		require.Eventually(t, func() bool {
			c, err := dialOnce("tcp", s.Address)
			if err == nil {
				c.Close()
			}
			return isRefused(err)
		}, limit(10*time.Second), 10*time.Millisecond)
		require.Zero(t, answered(conns))
	})
}

// The file of a unix socket goes with whoever lets go of the socket last, if that is a
// keeper.
func TestKeeperRemovesUnixSocketFile(t *testing.T) {
	beside(t)
	noLeaks(t)
	for _, while := range []time.Duration{0, limit(time.Second)} {
		path := handoffPath(t)
		app := path + ".sock"
		keeper := startKeeper(t, path, while)
		s := startServer(t, serverJob{Path: path, Network: "unix", Address: app, Members: 1})
		s.close()
		require.FileExists(t, app)
		if while == 0 {
			keeper.signal(syscall.SIGTERM)
			keeper.wait()
		}
		require.Eventually(t, func() bool { _, err := os.Stat(app); return errors.Is(err, os.ErrNotExist) }, limit(10*time.Second), time.Millisecond)
	}
}

// A keeper that is killed leaves processes that go on; when all of them are killed but
// one that listens elsewhere, that one keeps their sockets, for the next.
func TestKeeperIsKilled(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
		keeper := startKeeper(t, job.Path, 0)
		s := startServer(t, job)
		s.becomes(isHandedOff)
		keeper.kill()
		s.becomes(func(r serverReport) bool { return !isHandedOff(r) })
		startServer(t, job) // elsewhere
		conns := standing(t, s.Address, 20)
		s.kill()
		job.Address, job.Accept = s.Address, true
		startServer(t, job)
		require.Equal(t, len(conns), answered(conns))
	})
}

// What Keep doesn't take.
func TestKeepBadInput(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	require.ErrorContains(t, Keep(context.Background(), path, WithLB()), "option WithLB is for a listener; Keep takes WithLogger")
	require.ErrorContains(t, Keep(context.Background(), path, Option{}), "for a listener")
	require.ErrorContains(t, Keep(context.Background(), ""), "the path is empty")
	require.ErrorContains(t, Keep(context.Background(), "handoff"), "is relative")
	require.ErrorContains(t, Keep(context.Background(), path+"/none/handoff"), "make its parent")
	ctx, stop := context.WithCancel(context.Background())
	stop()
	require.NoError(t, Keep(ctx, path))
}

// An observer sees processes, addresses and sockets, and leaves no trace.
func TestKeeperLook(t *testing.T) {
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
		_, err := keeper.Look(context.Background(), job.Path)
		require.ErrorIs(t, err, os.ErrNotExist)
		startKeeper(t, job.Path, 0)
		s := startServer(t, job)
		s.becomes(isHandedOff)
		standing(t, s.Address, 6)
		all, err := keeper.Look(context.Background(), job.Path)
		require.NoError(t, err)
		require.Len(t, all.Processes, 2)
		i := slices.IndexFunc(all.Processes, func(p keeper.Process) bool { return !p.Keeper })
		require.Equal(t, fmt.Sprint(s.cmd.Process.Pid), all.Processes[i].PID)
		require.Len(t, all.Processes[i].Addresses, 1)
		require.True(t, strings.HasSuffix(all.Processes[i].Addresses[0], s.Address))
		require.True(t, all.Processes[1-i].Keeper)
		require.Len(t, all.Sockets, map[bool]int{false: 2, true: 1}[dispatcher])
		queued := 0
		for _, sock := range all.Sockets {
			require.Equal(t, []string{fmt.Sprint(s.cmd.Process.Pid)}, sock.Owners)
			require.Equal(t, 2, sock.Holders)
			queued += sock.Queued
		}
		if all.Sockets[0].Queued >= 0 {
			require.Equal(t, 6, queued)
		}
		require.True(t, isHandedOff(s.ask("report")), "the observer is no peer")
		s.kill()
		soon(t, func() bool {
			all, err = keeper.Look(context.Background(), job.Path)
			return err == nil && len(all.Processes) == 1
		}, "the dead process's file is there still")
		require.NotEmpty(t, all.Sockets)
		require.Empty(t, all.Sockets[0].Owners)
	})
}
