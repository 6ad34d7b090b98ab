//go:build unix && !aix

package lbhttp

// Restarts of real processes.

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
)

// A job is what a process serves.
type job struct {
	Addr, Handoff string
	Systemd       bool
	Secure        bool
	Takes, Grace  time.Duration
}

// worker serves a job until SIGTERM.
func worker(work string) {
	var j job
	must(json.Unmarshal([]byte(work), &j))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var opts []lblisten.Option
	if j.Handoff != "" {
		opts = append(opts, lblisten.WithHandoff(j.Handoff))
	}
	if j.Systemd {
		opts = append(opts, lblisten.WithSystemd())
	}
	g, err := lblisten.ListenGroup(ctx, "tcp", j.Addr, 2, opts...)
	must(err)
	fmt.Println(g.Addr())
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(j.Takes)
		hello(w, r)
	})}
	if j.Secure {
		srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate()}}
		must(ServeTLS(ctx, g, srv, "", "", j.Grace))
		return
	}
	must(Serve(ctx, g, srv, j.Grace))
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// A process serves a job.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	addr string
	end  func()
}

func startProcess(t testing.TB, by func(*exec.Cmd) error, j job) *process {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	work, err := json.Marshal(j)
	require.NoError(t, err)
	p := &process{t: t, cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), "LBHTTP_TEST_WORKER="+string(work), "GORACE=atexit_sleep_ms=0")
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, by(p.cmd))
	p.end = sync.OnceFunc(func() {
		late := time.AfterFunc(limit(30*time.Second), func() { p.cmd.Process.Kill() })
		defer late.Stop()
		p.cmd.Wait()
	})
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.end()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "a server ended")
	p.addr = strings.TrimSpace(line)
	return p
}

func (p *process) signal(sig os.Signal) { require.NoError(p.t, p.cmd.Process.Signal(sig)) }

// stop ends a process in order.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	p.end()
	require.True(p.t, p.cmd.ProcessState.Success(), "%v", p.cmd.ProcessState)
}

func handoffPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "h")
}

// Two processes are restarted in turn under load: the new one first, or the old one.
func TestRestartsOfProcesses(t *testing.T) {
	for _, kind := range []struct{ secure, h2 bool }{{false, false}, {true, false}, {true, true}} {
		for _, takes := range []time.Duration{5 * time.Millisecond, 200 * time.Millisecond} {
			for _, oldFirst := range []bool{false, true} {
				t.Run(fmt.Sprintf("TLS %v, HTTP2 %v, %v, old first %v", kind.secure, kind.h2, takes, oldFirst), func(t *testing.T) {
					t.Parallel()
					restartInTurn(t, kind.secure, kind.h2, oldFirst, takes)
				})
			}
		}
	}
}

func restartInTurn(t *testing.T, secure, h2, oldFirst bool, takes time.Duration) {
	j := job{Addr: "127.0.0.1:0", Handoff: handoffPath(t), Secure: secure, Takes: takes, Grace: limit(20 * time.Second)}
	var two [2]*process
	for i := range two {
		two[i] = startProcess(t, (*exec.Cmd).Start, j)
		j.Addr = two[i].addr
	}
	d := startLoad(t, j.Addr, 4, secure, h2)
	n := count(20, 3)
	for i := range n {
		old := two[i%2]
		if oldFirst {
			old.stop()
		}
		two[i%2] = startProcess(t, (*exec.Cmd).Start, j)
		if !oldFirst {
			old.stop()
		}
		time.Sleep(limit(20 * time.Millisecond))
	}
	t.Logf("%d restarts", n)
	d.end()
}

// A server is restarted while clients are in the middle of their TLS handshake, and go
// on up to 3 s later: all are answered.
func TestRestartDuringHandshakes(t *testing.T) {
	for _, oldFirst := range []bool{false, true} {
		t.Run(map[bool]string{false: "new before old", true: "old before new, a third lives"}[oldFirst], func(t *testing.T) {
			t.Parallel()
			j := job{Addr: "127.0.0.1:0", Handoff: handoffPath(t), Secure: true, Grace: limit(20 * time.Second)}
			old := startProcess(t, (*exec.Cmd).Start, j)
			j.Addr = old.addr
			if oldFirst {
				startProcess(t, (*exec.Cmd).Start, j)
			}
			const clients = 60
			longest := limit(3 * time.Second)
			if testing.Short() {
				longest /= 3
			}
			restart := make(chan struct{})
			var said, done sync.WaitGroup
			answers := make([]error, clients)
			for i := range clients {
				said.Add(1)
				done.Add(1)
				go func() {
					defer done.Done()
					c := &hesitant{Conn: dial(t, j.Addr, ""), half: i%2 == 0, wait: func() {
						said.Done()
						<-restart
						time.Sleep(longest * time.Duration(i) / clients)
					}}
					c.SetDeadline(time.Now().Add(limit(20 * time.Second)))
					secure := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
					defer secure.Close()
					fmt.Fprint(secure, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
					resp, err := http.ReadResponse(bufio.NewReader(secure), nil)
					if err == nil {
						_, err = io.ReadAll(resp.Body)
					}
					answers[i] = err
				}()
			}
			said.Wait()
			if !oldFirst {
				startProcess(t, (*exec.Cmd).Start, j)
			}
			close(restart)
			old.stop()
			done.Wait()
			for _, err := range answers {
				require.NoError(t, err)
			}
			t.Logf("%d tried, 0 lost", clients)
		})
	}
}

// A hesitant client sends its first message, or half of it, after a wait.
type hesitant struct {
	net.Conn
	half bool
	wait func()
	once sync.Once
}

func (c *hesitant) Write(b []byte) (n int, err error) {
	c.once.Do(func() {
		if c.half {
			n, err = c.Conn.Write(b[:len(b)/2])
		}
		c.wait()
	})
	if err != nil {
		return n, err
	}
	m, err := c.Conn.Write(b[n:])
	return n + m, err
}
