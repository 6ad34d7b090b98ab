package main

// The units of this example under a real systemd, in a container of systemd-nspawn.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// rootVariable names the root directory of a Debian with systemd, which the test writes
// to. .ci/systemd makes one.
const rootVariable = "LBLISTEN_TEST_ROOT"

// A container is a booted system.
type container struct {
	t    *testing.T
	root string
	init int // its first process
}

// boot boots the system.
func boot(t *testing.T) *container {
	t.Helper()
	root := os.Getenv(rootVariable)
	switch {
	case root == "":
		t.Skip(rootVariable + " names no system with systemd: .ci/systemd makes one, and runs this")
	case os.Geteuid() != 0:
		t.Skip("systemd-nspawn takes root")
	}
	cmd := exec.Command("systemd-nspawn", "-D", root, "--boot", "--register=no", "--private-network", "--keep-unit", "--quiet")
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	require.NoError(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	c := &container{t: t, root: root}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("the container: %s", b)
		}
		if c.init != 0 {
			exec.Command("nsenter", "-t", strconv.Itoa(c.init), "-a", "systemctl", "poweroff").Run()
		}
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
	})
	children := fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid)
	require.Eventually(t, func() bool {
		b, _ := os.ReadFile(children)
		c.init, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		if c.init == 0 {
			return false
		}
		out, err := c.command("systemctl", "is-system-running").Output()
		return err == nil || strings.TrimSpace(string(out)) == "degraded"
	}, 60*time.Second, 100*time.Millisecond, "it doesn't boot")
	return c
}

func (c *container) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(c.init), "-a"}, args...)...)
}

func (c *container) run(args ...string) string {
	c.t.Helper()
	out, err := c.command(args...).CombinedOutput()
	require.NoError(c.t, err, "%v: %s", args, out)
	return strings.TrimSpace(string(out))
}

// install copies a file to a place in the container.
func (c *container) install(from, to string, mode os.FileMode) {
	c.t.Helper()
	b, err := os.ReadFile(from)
	require.NoError(c.t, err)
	to = filepath.Join(c.root, to)
	os.Remove(to) // it may run
	require.NoError(c.t, os.WriteFile(to, b, mode))
}

// mainPID is the main process of a unit, as it is called outside.
func (c *container) mainPID(unit string) int {
	c.t.Helper()
	inside := c.run("systemctl", "show", "-p", "MainPID", "--value", unit)
	all, err := filepath.Glob("/proc/[0-9]*/status")
	require.NoError(c.t, err)
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", c.init))
	require.NoError(c.t, err)
	for _, status := range all {
		b, _ := os.ReadFile(status)
		for _, line := range strings.Split(string(b), "\n") {
			if pids, ok := strings.CutPrefix(line, "NSpid:"); ok && strings.HasSuffix(pids, "\t"+inside) {
				if its, _ := os.Readlink(filepath.Join(filepath.Dir(status), "ns/pid")); its == space {
					pid, err := strconv.Atoi(filepath.Base(filepath.Dir(status)))
					require.NoError(c.t, err)
					return pid
				}
			}
		}
	}
	require.Fail(c.t, "no main process", "of %s: %s", unit, inside)
	return 0
}

// kill kills the main process of a unit, when it has told the clients whose connections
// die with it.
func (c *container) kill(unit string, port int, d *clients) {
	c.t.Helper()
	pid := c.mainPID(unit)
	require.NoError(c.t, syscall.Kill(pid, syscall.SIGSTOP))
	require.Eventually(c.t, func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, task := range tasks {
			b, _ := os.ReadFile(task)
			if _, state, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(state, "T") {
				return false
			}
		}
		return len(tasks) > 0
	}, 10*time.Second, time.Millisecond, "it doesn't stop")
	d.doom(append(accepted(c.t, pid, port), accepted(c.t, pid, port)...))
	require.NoError(c.t, syscall.Kill(pid, syscall.SIGKILL))
}

// accepted returns the clients' ports of the connections to a port that a process holds.
func accepted(t *testing.T, pid, port int) (ports []int) {
	t.Helper()
	held := make(map[string]bool)
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	require.NoError(t, err)
	for _, fd := range fds {
		link, _ := os.Readlink(fd)
		held[strings.TrimSuffix(strings.TrimPrefix(link, "socket:["), "]")] = true
	}
	for _, table := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		require.NoError(t, err)
		for _, line := range strings.Split(string(b), "\n")[1:] {
			if f := strings.Fields(line); len(f) > 9 && f[3] != "0A" && held[f[9]] && hexPort(f[1]) == port {
				ports = append(ports, hexPort(f[2]))
			}
		}
	}
	return ports
}

func hexPort(addr string) int {
	_, hex, _ := strings.Cut(addr, ":")
	port, _ := strconv.ParseUint(hex, 16, 16)
	return int(port)
}

// clients are a process in the network of the container.
type clients struct {
	c   *container
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func init() {
	workers[loadVariable] = loadWorker
	workers[plainVariable] = plainWorker
}

// result is what clients say at the end.
type result struct {
	Tried, Failed, Died int
	Longest             time.Duration
	First               string
}

const loadVariable, plainVariable = "ONE_TEST_LOAD", "ONE_TEST_PLAIN"

func (c *container) load(port int) *clients {
	c.t.Helper()
	self, err := os.Executable()
	require.NoError(c.t, err)
	d := &clients{c: c, cmd: exec.Command("nsenter", "-t", strconv.Itoa(c.init), "-n", self)}
	d.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=http://127.0.0.1:%d", loadVariable, port))
	d.cmd.Stderr = os.Stderr
	d.in, err = d.cmd.StdinPipe()
	require.NoError(c.t, err)
	out, err := d.cmd.StdoutPipe()
	require.NoError(c.t, err)
	d.out = bufio.NewReader(out)
	require.NoError(c.t, d.cmd.Start())
	c.t.Cleanup(func() {
		d.in.Close()
		d.cmd.Wait()
	})
	return d
}

// doom tells that connections from these ports are about to die with their process.
func (d *clients) doom(ports []int) {
	d.c.t.Helper()
	require.NoError(d.c.t, json.NewEncoder(d.in).Encode(ports))
	_, err := d.out.ReadString('\n')
	require.NoError(d.c.t, err)
}

func (d *clients) end() (r result) {
	d.c.t.Helper()
	d.in.Close()
	require.NoError(d.c.t, json.NewDecoder(d.out).Decode(&r))
	return r
}

// loadWorker is the process: some clients that send GET and POST in turn, on connections
// that they keep.
func loadWorker(url string) {
	var mu sync.Mutex // guards what follows
	var r result
	doomed := make(map[int]bool)
	var all sync.WaitGroup
	stop := make(chan struct{})
	for i := range 4 {
		all.Add(1)
		go func() {
			defer all.Done()
			client := &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}
			for j := i; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				port := 0
				trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
					port = info.Conn.LocalAddr().(*net.TCPAddr).Port
					if !info.Reused {
						mu.Lock()
						delete(doomed, port)
						mu.Unlock()
					}
				}}
				begin := time.Now()
				err := request(client, trace, url, j%2 == 0)
				mu.Lock()
				r.Tried++
				r.Longest = max(r.Longest, time.Since(begin))
				switch {
				case err == nil:
				case doomed[port]:
					delete(doomed, port)
					r.Died++
				default:
					if r.Failed++; r.First == "" {
						r.First = err.Error()
					}
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(10 * time.Millisecond)
				}
			}
		}()
	}
	in := json.NewDecoder(os.Stdin)
	for {
		var ports []int
		if in.Decode(&ports) != nil {
			break
		}
		mu.Lock()
		for _, port := range ports {
			doomed[port] = true
		}
		mu.Unlock()
		fmt.Println("noted")
	}
	close(stop)
	all.Wait()
	json.NewEncoder(os.Stdout).Encode(r)
}

func request(client *http.Client, trace *httptrace.ClientTrace, url string, post bool) error {
	method, body := http.MethodGet, io.Reader(nil)
	if post {
		method, body = http.MethodPost, struct{ io.Reader }{strings.NewReader("body")} // that can't be sent again
	}
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.ReadAll(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// plainWorker is what one would be with net.Listen, for comparison.
func plainWorker(addr string) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go srv.Serve(ln)
	<-ctx.Done()
	late, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	srv.Shutdown(late)
}

const plainUnit = `
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/local/bin/one.test
Environment=` + plainVariable + `=:8081
Restart=always
RestartSec=0
DynamicUser=yes
`

// The unit is restarted, and its process killed, under load: no request fails but those
// that died with the process. The same with net.Listen, for comparison. Then socket
// activation; and "systemctl stop" ends the port.
func TestRealSystemd(t *testing.T) {
	c := boot(t)
	version, _, _ := strings.Cut(c.run("systemctl", "--version"), "\n")
	t.Log(version)
	bin := filepath.Join(t.TempDir(), "one")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	self, err := os.Executable()
	require.NoError(t, err)
	c.install(bin, "/usr/local/bin/one", 0o755)
	c.install(self, "/usr/local/bin/one.test", 0o755)
	c.install("one.service", "/etc/systemd/system/one.service", 0o644)
	c.install("one.socket", "/etc/systemd/system/one.socket", 0o644)
	require.NoError(t, os.WriteFile(filepath.Join(c.root, "/etc/systemd/system/plain.service"), []byte(plainUnit), 0o644))
	c.run("systemctl", "daemon-reload")

	const times = 10
	try := func(unit string, port int, kills bool) result {
		t.Helper()
		d := c.load(port)
		for range times {
			time.Sleep(100 * time.Millisecond)
			c.run("systemctl", "restart", unit)
		}
		for range times {
			if kills {
				time.Sleep(100 * time.Millisecond)
				was := c.run("systemctl", "show", "-p", "MainPID", "--value", unit)
				c.kill(unit, port, d)
				require.Eventually(t, func() bool {
					now := c.run("systemctl", "show", "-p", "MainPID,ActiveState", "--value", unit)
					return !strings.Contains(now, was) && strings.Contains(now, "active") && !strings.Contains(now, "activating")
				}, 20*time.Second, 10*time.Millisecond, "it isn't restarted")
			}
		}
		time.Sleep(100 * time.Millisecond)
		r := d.end()
		t.Logf("%s, %d restarts, %d kills: %d tried, %d failed, %d died with a process; the longest took %v; the first failure: %q",
			unit, times, map[bool]int{true: times}[kills], r.Tried, r.Failed, r.Died, r.Longest.Round(time.Millisecond), r.First)
		return r
	}
	awaitPort := func(port int, answers bool) {
		t.Helper()
		require.Eventually(t, func() bool {
			return (c.command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d", port)).Run() == nil) == answers
		}, 10*time.Second, 10*time.Millisecond)
	}

	c.run("systemctl", "start", "plain")
	awaitPort(8081, true)
	try("plain", 8081, true)
	c.run("systemctl", "stop", "plain")

	c.run("systemctl", "start", "one")
	r := try("one", 8080, true)
	require.Zero(t, r.Failed, r.First)
	require.LessOrEqual(t, r.Died, 4*times)
	c.run("systemctl", "stop", "one")
	awaitPort(8080, false)

	c.run("systemctl", "start", "one.socket")
	awaitPort(8080, true)
	r = try("one", 8080, true)
	require.Zero(t, r.Failed, r.First)
	c.run("systemctl", "stop", "one.socket", "one.service")
	awaitPort(8080, false)
	t.Log(c.run("bash", "-c", "journalctl -o cat -u one | grep ready | tail -1"))
}
