package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/child"
)

// slow is what time limits are multiplied by, as in the package's own tests.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || f < 1 {
		return 1
	}
	return f
}()

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// count is n on a usual machine, less on a slow one, and at least least.
func count(n, least int) int { return max(least, int(float64(n)/slow)) }

// mainVariable makes the test binary the program itself.
const mainVariable = "LBLISTEN_DASHBOARD_MAIN"

func TestMain(m *testing.M) {
	patience, obedience = limit(patience), limit(obedience)
	stallTime = limit(30 * time.Second) // until the worker is killed, on a slow machine too
	_, isWorker := os.LookupEnv(jobVariable)
	if _, isProgram := os.LookupEnv(mainVariable); isProgram || isWorker {
		os.Args = append(os.Args[:1], strings.Fields(os.Getenv(mainVariable))...)
		main()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// needProcesses skips the test where no second process can have the address.
func needProcesses(t *testing.T) {
	dir, err := os.MkdirTemp("", "")
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithHandoff(filepath.Join(dir, "handoff")))
	if errors.Is(err, lblisten.ErrUnsupported) {
		t.Skipf("one worker only: %v", err)
	}
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}

// client keeps no connection, which others would have to wait for.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// page is what a browser would be.
type page struct {
	*testing.T
	url string
}

// startDashboard runs a dashboard until the test ends, in this process.
func startDashboard(t *testing.T, s settings) page {
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- run(ctx, s, func(url string) { ready <- url }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			require.NoError(t, err)
		case <-time.After(limit(20 * time.Second)):
			t.Error("the dashboard doesn't end")
		}
	})
	select {
	case url := <-ready:
		return page{t, url}
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	panic("unreachable")
}

func (p page) get(path string) (*http.Response, string) {
	p.Helper()
	resp, err := client.Get(p.url + path)
	require.NoError(p, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(p, err)
	return resp, string(body)
}

// order presses a button and returns the status of the answer.
func (p page) order(o order, change ...func(*http.Request)) int {
	p.Helper()
	body, err := json.Marshal(o)
	require.NoError(p, err)
	req, err := http.NewRequest(http.MethodPost, p.url+"/orders", bytes.NewReader(body))
	require.NoError(p, err)
	for _, f := range change {
		f(req)
	}
	resp, err := client.Do(req)
	require.NoError(p, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(p, err)
	if resp.StatusCode != http.StatusNoContent {
		p.Logf("%s: %s", o.Do, text)
	}
	return resp.StatusCode
}

// await reads events until one is as wanted.
func (p page) await(what string, wanted func(s state) bool) (s state) {
	p.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit(30*time.Second))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/events", nil)
	require.NoError(p, err)
	resp, err := client.Do(req)
	require.NoError(p, err)
	defer resp.Body.Close()
	require.Equal(p, "text/event-stream", resp.Header.Get("Content-Type"))
	in := bufio.NewReader(resp.Body)
	for {
		line, err := in.ReadString('\n')
		require.NoError(p, err, "waiting until %s; it is %+v", what, s)
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		s = state{}
		require.NoError(p, json.Unmarshal([]byte(data), &s))
		for _, side := range s.Sides {
			c := side.Tally
			require.Equal(p, c.Tried, c.Waiting+c.Served+c.Lost+c.Died+c.Refused+c.Other, "%s: %+v", side.By, c)
		}
		if wanted(s) {
			return s
		}
	}
}

// covered tells whether all workers of lblisten run, and others hold their sockets.
func covered(s state) bool {
	for _, w := range s.Sides[0].Workers {
		if w.State != "running" || !strings.Contains(w.OnKill, lblisten.InheritHandoff.String()) {
			return false
		}
	}
	return true
}

// Of two workers with full queues one is killed. By lblisten nothing is lost. It
// is started again, and the counters are those of the clients.
func TestKill(t *testing.T) {
	t.Parallel()
	needProcesses(t)
	p := startDashboard(t, settings{http: "127.0.0.1:0", workers: 2, listeners: 4, rate: count(200, 20), burst: count(2000, 200)})
	s := p.await("all workers hold each other's sockets", covered)
	for i := range s.Sides[0].Workers[0].Listeners {
		require.Equal(t, http.StatusNoContent, p.order(order{Do: "stall", Listener: i}))
	}
	p.await("listeners stall", func(s state) bool {
		return s.Sides[0].Workers[0].Listeners[3].State == "stalled"
	})
	burst := s.Burst
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "burst"}))
	if s.Mode == modeKernel {
		// Half of the burst waits for listeners that stall. Where the system
		// doesn't tell, all that wait do, once the other worker is through.
		p.await("the queues fill", func(s state) bool {
			for _, side := range s.Sides {
				filled := side.Tally.Waiting >= burst/4
				for _, tick := range side.History { // on a slow machine they aren't full together
					filled = filled || tick.Waiting >= burst/4
				}
				if side.Err == "" && !filled {
					return false
				}
			}
			return true
		})
	}
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "kill"}))
	require.Equal(t, http.StatusConflict, p.order(order{Do: "kill"}), "it is dead")
	s = p.await("all who waited are served, lost or dead", func(s state) bool {
		return s.Sides[0].Workers[0].State == "killed" && s.Sides[0].Tally.Waiting < burst/20 && s.Sides[1].Tally.Waiting < burst/20
	})
	ours, theirs := s.Sides[0], s.Sides[1]
	t.Logf("lblisten: %+v, exact: %v", ours.Tally, ours.Exact)
	t.Logf("go-reuseport: %+v, exact: %v", theirs.Tally, theirs.Exact)
	for _, l := range s.Log {
		t.Log(l.At, l.Text)
	}
	require.Equal(t, child.CanFreeze, ours.Exact)
	if ours.Exact {
		require.Zero(t, ours.Tally.Lost)
	} else {
		require.LessOrEqual(t, ours.Tally.Lost, 8) // accepted and not recorded: one for each listener at most
	}
	require.Zero(t, ours.Tally.Refused+ours.Tally.Other)
	if s.Mode == modeKernel && theirs.Err == "" && !migrates() {
		require.NotZero(t, theirs.Tally.Lost, "the kernel resets queued connections")
	}

	require.Equal(t, http.StatusNoContent, p.order(order{Do: "restart"}))
	p.await("the new worker accepts", func(s state) bool {
		return covered(s) && s.Sides[0].Workers[0].Listeners[0].Rate > 0
	})
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "reset"}))
	s = p.await("the counters are reset", func(s state) bool { return s.Sides[0].Tally.Lost+s.Sides[1].Tally.Lost == 0 })
	require.Less(t, s.Sides[0].Tally.Tried, burst, "those of the burst are counted still")
}

// migrates tells whether the kernel inherits for everybody: DragonFly's does, and
// Linux's by a sysctl.
func migrates() bool {
	if runtime.GOOS == "dragonfly" {
		return true
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_migrate_req")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// A listener is closed and opened, workers are restarted, and the balancer is
// changed and changed back, and nobody is lost.
func TestButtons(t *testing.T) {
	t.Parallel()
	needProcesses(t)
	p := startDashboard(t, settings{http: "127.0.0.1:0", workers: 2, listeners: 2, rate: count(200, 20)})
	before := p.await("all workers hold each other's sockets", covered)
	isState := func(want string) func(state) bool {
		return func(s state) bool { return s.Sides[0].Workers[1].Listeners[0].State == want }
	}
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "close", Worker: 1}))
	p.await("it is closed", isState("closed"))
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "open", Worker: 1}))
	p.await("it is open", isState("open"))
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "restart", Worker: 1}))
	s := p.await("all workers hold each other's sockets", covered)
	require.NotEqual(t, before.Sides[0].Workers[1].PID, s.Sides[0].Workers[1].PID)
	require.Equal(t, before.Sides[0].Workers[0].PID, s.Sides[0].Workers[0].PID)

	if s.CanKernel {
		require.Equal(t, http.StatusNoContent, p.order(order{Do: "mode", Mode: modeDispatcher}))
		s = p.await("the dispatcher balances", covered)
		require.Equal(t, lblisten.BalancerDispatcher.String(), s.Sides[0].Workers[0].Balancer)
		require.Equal(t, http.StatusNoContent, p.order(order{Do: "mode", Mode: modeKernel}))
		s = p.await("the kernel balances", covered)
		require.Equal(t, lblisten.BalancerKernel.String(), s.Sides[0].Workers[0].Balancer)
	}
	served := s.Sides[0].Tally.Served
	s = p.await("more are served", func(s state) bool { return s.Sides[0].Tally.Served > served+20 })
	c := s.Sides[0].Tally
	t.Logf("lblisten: %+v", c)
	require.Zero(t, c.Lost+c.Died+c.Refused+c.Other)

	for _, o := range []order{{Do: "kill", Worker: 2}, {Do: "stall", Listener: -1}, {Do: "mode", Mode: "magic"}, {Do: "dance"}} {
		require.Equal(t, http.StatusConflict, p.order(o), "%+v", o)
	}
}

// The only worker is killed, and restarted by stop and start: with a keeper nobody is lost
// whom it hadn't accepted.
func TestKeeper(t *testing.T) {
	t.Parallel()
	needProcesses(t)
	p := startDashboard(t, settings{http: "127.0.0.1:0", workers: 1, listeners: 2, rate: count(200, 20)})
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "keeper"}))
	isKept := func(s state) bool { return strings.Contains(s.Sides[0].Workers[0].OnKill, "handoff") }
	s := p.await("the keeper has all sockets", isKept)
	require.True(t, s.Keeper)
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "kill"}))
	p.await("the worker is gone", func(s state) bool { return s.Sides[0].Workers[0].State == "killed" })
	for range 2 { // the second one ends in order
		require.Equal(t, http.StatusNoContent, p.order(order{Do: "restart"}))
		s = p.await("the keeper has all sockets", isKept)
		served := s.Sides[0].Tally.Served
		s = p.await("more are served", func(s state) bool { return s.Sides[0].Tally.Served > served+20 })
	}
	c := s.Sides[0].Tally
	t.Logf("lblisten: %+v", c)
	require.Zero(t, c.Lost+c.Refused+c.Other)
	require.Equal(t, http.StatusNoContent, p.order(order{Do: "keeper"}))
	p.await("nobody keeps", func(s state) bool { return !s.Keeper && s.Sides[0].Workers[0].OnKill == "none" })
}

// The page takes orders from itself only, and is read under its own name only.
func TestForeigners(t *testing.T) {
	t.Parallel()
	p := startDashboard(t, settings{http: "127.0.0.1:0", workers: 1, listeners: 1, rate: 10})
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	host := func(h string) func(*http.Request) { return func(r *http.Request) { r.Host = h } }
	for name, c := range map[string]struct {
		status int
		change []func(*http.Request)
	}{
		"no browser":                     {http.StatusNoContent, nil},
		"the page":                       {http.StatusNoContent, []func(*http.Request){header("Origin", p.url), header("Sec-Fetch-Site", "same-origin")}},
		"the page by another name":       {http.StatusNoContent, []func(*http.Request){host("localhost:80"), header("Origin", "http://localhost:80")}},
		"another site":                   {http.StatusForbidden, []func(*http.Request){header("Origin", "http://example.com")}},
		"another port":                   {http.StatusForbidden, []func(*http.Request){header("Origin", "http://127.0.0.1:1")}},
		"no origin to tell":              {http.StatusForbidden, []func(*http.Request){header("Origin", "null")}},
		"another site, by fetch data":    {http.StatusForbidden, []func(*http.Request){header("Sec-Fetch-Site", "cross-site")}},
		"another port, by fetch data":    {http.StatusForbidden, []func(*http.Request){header("Sec-Fetch-Site", "same-site")}},
		"a name that was made to get in": {http.StatusForbidden, []func(*http.Request){host("example.com"), header("Origin", "http://example.com")}},
	} {
		require.Equal(t, c.status, p.order(order{Do: "reset"}, c.change...), name)
	}
	req, err := http.NewRequest(http.MethodGet, p.url+"/state", nil)
	require.NoError(t, err)
	req.Host = "example.com"
	resp, err := client.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusForbidden, resp.StatusCode)
}

// The page and all it needs come from here, and nothing in it is inline.
func TestFiles(t *testing.T) {
	t.Parallel()
	p := startDashboard(t, settings{http: "127.0.0.1:0", workers: 1, listeners: 1, rate: 10})
	for path, kind := range map[string]string{"/": "text/html", "/style.css": "text/css", "/app.js": "text/javascript", "/icon.svg": "image/svg+xml", "/state": "application/json"} {
		resp, body := p.get(path)
		require.Equal(t, http.StatusOK, resp.StatusCode, path)
		require.Contains(t, resp.Header.Get("Content-Type"), kind, path)
		require.Contains(t, resp.Header.Get("Content-Security-Policy"), "default-src 'none'; script-src 'self'; style-src 'self'")
		require.NotContains(t, resp.Header.Get("Content-Security-Policy"), "unsafe")
		require.NotContains(t, body, " style=")
		require.NotContains(t, strings.ReplaceAll(body, "http://www.w3.org/", ""), "://", "%s needs something from elsewhere", path)
	}
	resp, _ := p.get("/nothing")
	require.Equal(t, http.StatusNotFound, resp.StatusCode)
}

func TestFlags(t *testing.T) {
	s, err := parseFlags([]string{"-http", ":1", "-workers", "3", "-listeners", "5", "-rate", "0"})
	require.NoError(t, err)
	require.Equal(t, settings{http: ":1", workers: 3, listeners: 5, burst: 2000}, s)
	for _, args := range [][]string{{"-workers", "0"}, {"-workers", "9"}, {"-listeners", "17"}, {"-rate", "2001"}, {"-rate", "-1"}, {"more"}} {
		_, err := parseFlags(args)
		require.Error(t, err, "%v", args)
	}
}

// The whole program ends by a signal, and leaves no process and no file.
func TestEnd(t *testing.T) {
	t.Parallel()
	needProcesses(t)
	for _, sig := range endSignals {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			self, err := os.Executable()
			require.NoError(t, err)
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), mainVariable+"=-http 127.0.0.1:0 -rate 100", "TMPDIR="+dir)
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			defer cmd.Process.Kill()
			line, err := bufio.NewReader(out).ReadString('\n')
			require.NoError(t, err)
			p := page{t, strings.Fields(line)[1]}
			s := p.await("connections are served", func(s state) bool { return s.Sides[0].Tally.Served > 20 && covered(s) })
			require.NoError(t, cmd.Process.Signal(sig))
			require.NoError(t, cmd.Wait())
			files, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, files)
			for _, side := range s.Sides {
				for _, w := range side.Workers {
					require.False(t, runs(w.PID), "%s, process %d", side.By, w.PID)
				}
			}
		})
	}
}
