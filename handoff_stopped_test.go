//go:build unix && !aix

package lblisten

// Processes of a handoff that are stopped, at any step of anything, for any time.

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// stopSteps are so many times, up to the last, after which a process is stopped that was
// told to do something.
func stopSteps(n int, last time.Duration) (steps []time.Duration) {
	for i := range n {
		steps = append(steps, limit(last*time.Duration(i*i)/time.Duration(n*n)))
	}
	return steps
}

// A process is stopped at any step of its join, or its leave, and meanwhile all others
// are restarted, the new one first: nobody's request fails. When it goes on, it is one of
// the handoff again, and what it owns is its own.
func TestHandoffStoppedAtAnyStep(t *testing.T) {
	beside(t)
	for step, steps := range map[string][]time.Duration{"joins": stopSteps(races(count(16, 2), 4), 60*time.Millisecond), "leaves": stopSteps(races(count(6, 1), 2), 3*time.Millisecond), "serves": stopSteps(races(count(2, 1), 1), 0)} {
		t.Run(step, func(t *testing.T) {
			beside(t)
			inHandoffModes(t, func(t *testing.T, dispatcher bool) {
				job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher, Accept: true}
				servers := []*server{startServer(t, job)}
				job.Address = servers[0].Address
				servers = append(servers, startServer(t, job))
				d := startPaced(2*time.Millisecond, 3, "tcp", job.Address)
				var slowest time.Duration
				for _, after := range steps {
					var stopped *server
					switch step {
					case "joins":
						stopped = beginServer(t, job)
					default:
						stopped = startServer(t, job)
						stopped.becomes(isHandedOff)
					}
					if step == "leaves" {
						fmt.Fprintln(stopped.in, "close")
					}
					time.Sleep(after)
					stopped.signal(syscall.SIGSTOP)
					for i, old := range servers { // a rolling restart
						servers[i] = startServer(t, job)
						slowest = max(slowest, servers[i].Took)
						servers[i].becomes(isHandedOff)
						r := old.ask("close")
						slowest = max(slowest, r.Took)
						old.in.Close()
						old.wait()
					}
					stopped.signal(syscall.SIGCONT)
					switch step {
					case "joins":
						stopped.hear()
						require.Empty(t, stopped.Err)
					case "leaves":
						stopped.hear()
						stopped.in.Close()
						stopped.wait()
						continue
					}
					for _, s := range append(servers, stopped) {
						s.becomes(isHandedOff)
					}
					if !dispatcher { // those that served its sockets don't any more
						for _, s := range append(servers, stopped) {
							s.becomes(func(r serverReport) bool { return r.Sockets <= 3*job.Members })
						}
					}
					stopped.close()
				}
				d.end(t, !dispatcher)
				t.Logf("%d times; the slowest Listen or Close took %v", len(steps), slowest.Round(time.Millisecond))
				require.Less(t, slowest, limit(4*time.Second))
			})
		})
	}
}

// All processes, the keeper too, are stopped for longer than anybody waits for an answer,
// and go on: nothing is lost, nobody takes another for gone, and each serves its own.
func TestHandoffAllStopped(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Members: 2, Dispatcher: dispatcher, Accept: true}
		all := []*server{startKeeper(t, job.Path, 0)}
		for range 3 {
			all = append(all, startServer(t, job))
			job.Address = all[1].Address
		}
		for _, s := range all[1:] {
			s.becomes(isHandedOff)
		}
		own := all[1].Sockets
		newcomer := beginServer(t, job)
		all = append(all, newcomer)
		time.Sleep(limit(10 * time.Millisecond))
		for _, s := range all {
			s.signal(syscall.SIGSTOP)
		}
		conns := standing(t, job.Address, queued(count(200, 20), queues(dispatcher, 6)))
		time.Sleep(2 * exchangeTime)
		for _, s := range all {
			s.signal(syscall.SIGCONT)
		}
		require.Equal(t, len(conns), answered(conns))
		newcomer.hear()
		require.Empty(t, newcomer.Err)
		for _, s := range all[1:] {
			s.becomes(isHandedOff)
			require.Equal(t, own, s.Sockets)
		}
		for _, c := range conns {
			c.Close()
		}
		for _, s := range all[1:] {
			s.close()
		}
	})
}
