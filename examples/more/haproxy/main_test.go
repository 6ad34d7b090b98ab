//go:build linux

package main

import (
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// The table of docs/several-hosts.md: go test -v ./haproxy -args -table -rounds 20
var (
	table  = flag.Bool("table", false, "TestLosses: all rows, not just those with a promise")
	rounds = flag.Int("rounds", 2, "TestLosses: `number` of restarts or kills in a row")
)

// A host is processes on one address.
type host struct {
	t         *testing.T
	addr      string
	handoff   string // path, "" if none
	processes []*exampletest.Process
}

func (h *host) start() {
	h.t.Helper()
	p := exampletest.Run(h.t, exampletest.Unprivileged(h.t, exampletest.Command(h.t, "-addr", h.addr, "-handoff", h.handoff)))
	p.Hear("ready on ")
	h.processes = append(h.processes, p)
}

// restart stops the oldest process, then starts one.
func (h *host) restart() {
	h.processes[0].Stop(syscall.SIGTERM)
	h.processes = h.processes[1:]
	h.start()
}

// kill has the oldest process stand still for a moment, in which its queue fills,
// kills it, and starts one. It returns how many connections the process had accepted.
func (h *host) kill() (held int) {
	p := h.processes[0]
	exampletest.Freeze(h.t, p.Pid())
	held = connections(h.t, p.Pid(), h.addr)
	time.Sleep(100 * time.Millisecond) // of the experiment; nothing is waited for
	p.Signal(syscall.SIGKILL)
	p.Wait()
	h.processes = h.processes[1:]
	h.start()
	return held
}

// connections counts those of a process, at the port of addr, with a peer.
func connections(t *testing.T, pid int, addr string) (n int) {
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	require.NoError(t, err)
	port := fmt.Sprintf(":%04X", tcp.Port)
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	require.NoError(t, err)
	var inodes []string
	for _, f := range files {
		if link, err := os.Readlink(f); err == nil {
			if inode, ok := strings.CutPrefix(link, "socket:["); ok {
				inodes = append(inodes, strings.TrimSuffix(inode, "]"))
			}
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		require.NoError(t, err)
		for _, line := range strings.Split(string(b), "\n") {
			// sl local remote state queues timer retransmits uid timeout inode; state 0A listens
			f := strings.Fields(line)
			if len(f) > 9 && strings.HasSuffix(f[1], port) && f[3] != "0A" && slices.Contains(inodes, f[9]) {
				n++
			}
		}
	}
	return n
}

// startHAProxy starts it with haproxy.cfg, changed by edit, and returns its address.
func startHAProxy(t *testing.T, edit *strings.Replacer, hosts ...string) string {
	tool, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("no haproxy (Debian: haproxy)")
	}
	config, err := os.ReadFile("haproxy.cfg")
	require.NoError(t, err)
	file := filepath.Join(exampletest.Dir(t), "haproxy.cfg")
	require.NoError(t, os.WriteFile(file, []byte(edit.Replace(string(config))), 0o644))
	front := fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
	cmd := exec.Command(tool, "-db", "-f", file)
	cmd.Env = append(os.Environ(), "FRONT="+front)
	for i, h := range hosts {
		cmd.Env = append(cmd.Env, fmt.Sprintf("HOST%d=%s", i+1, h))
	}
	exampletest.Run(t, cmd)
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", front)
		if err == nil {
			c.Close()
		}
		return err == nil
	}, exampletest.Limit(30*time.Second), 10*time.Millisecond)
	return front
}

// reasons counts errors by what they say, without the addresses.
func reasons(failed []error) map[string]int {
	why := make(map[string]int)
	for _, err := range failed {
		text := strings.Join(strings.Fields(err.Error()), " ")
		if _, rest, ok := strings.Cut(text, "127.0.0.1:"); ok {
			text = strings.TrimLeft(rest, "0123456789\": ")
		}
		why[text]++
	}
	return why
}

// What is lost behind HAProxy when processes are restarted, or killed after they
// stood still for 100 ms. With the handoff it is at most what the killed process had
// accepted; and nothing, if HAProxy repeats that.
func TestLosses(t *testing.T) {
	bare := []string{"    option redispatch 1\n", "", "    retry-on conn-failure empty-response\n", ""}
	redispatch := bare[2:]
	for _, row := range []struct {
		name             string
		config           []string // what to change in haproxy.cfg
		hosts, processes int      // processes of each host
		handoff, ci      bool
	}{
		{"bare,2x1", bare, 2, 1, false, false},
		{"bare,1x2", bare, 1, 2, false, false},
		{"bare,1x2,handoff", bare, 1, 2, true, true},
		{"bare,2x2,handoff", bare, 2, 2, true, false},
		{"redispatch,2x1", redispatch, 2, 1, false, false},
		{"redispatch,1x2", redispatch, 1, 2, false, false},
		{"redispatch,1x2,handoff", redispatch, 1, 2, true, false},
		{"redispatch,2x2,handoff", redispatch, 2, 2, true, false},
		{"repeat,2x1", nil, 2, 1, false, false},
		{"repeat,1x2", nil, 1, 2, false, false},
		{"repeat,1x2,handoff", nil, 1, 2, true, false},
		{"repeat,2x2,handoff", nil, 2, 2, true, true},
	} {
		for _, how := range []string{"restart", "kill"} {
			if !row.ci && !*table {
				continue
			}
			t.Run(row.name+"/"+how, func(t *testing.T) {
				hosts := make([]*host, row.hosts)
				addrs := make([]string, row.hosts)
				for i := range hosts {
					addrs[i] = fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
					hosts[i] = &host{t: t, addr: addrs[i]}
					if row.handoff {
						hosts[i].handoff = filepath.Join(exampletest.Dir(t), "handoff")
					}
					for range row.processes {
						hosts[i].start()
					}
				}
				config := row.config
				if row.hosts == 1 {
					config = append(slices.Clone(config), "    server host2 \"${HOST2}\"\n", "")
				}
				front := startHAProxy(t, strings.NewReplacer(config...), addrs...)
				load := exampletest.StartLoad(t, 16, "http://"+front, func() *http.Transport { return new(http.Transport) })
				load.Await(100)
				held := 0
				for i := range *rounds {
					h := hosts[i%len(hosts)]
					if how == "kill" {
						held += h.kill()
					} else {
						h.restart()
					}
					load.Await(100)
				}
				answered, by, failed := load.End()
				t.Logf("%s, %s: %d rounds, %d requests, %d failed; %d connections were held by killed processes", row.name, how, *rounds, answered+len(failed), len(failed), held)
				for why, n := range reasons(failed) {
					t.Logf("%d times %s", n, why)
				}
				for who := range by {
					require.Contains(t, who, "answers 127.0.0.1")
				}
				switch {
				case row.handoff && row.config == nil:
					require.Empty(t, failed)
				case row.handoff:
					require.LessOrEqual(t, len(failed), held, "%v", failed)
				}
			})
		}
	}
}

// Who sends no PROXY header is not served.
func TestWithoutHeader(t *testing.T) {
	p := exampletest.Start(t, "-addr", "127.0.0.1:0")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: exampletest.Limit(20 * time.Second)}
	_, err := exampletest.Get(client, "http://"+p.Hear("ready on "))
	require.Error(t, err)
	p.Stop(syscall.SIGTERM)
}
