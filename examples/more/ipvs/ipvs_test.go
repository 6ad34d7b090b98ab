//go:build linux

// Package ipvs tries what is lost behind IPVS when a process of one of two hosts is
// restarted or killed. The hosts are network namespaces. Where the kernel has no IPVS
// everything runs in a user-mode Linux, which has.
package ipvs

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

// insideVariable says that this process is in a network of its own, or in the
// user-mode Linux, and may do there what it likes.
const insideVariable = "LBLISTEN_IPVS_INSIDE"

// The table of docs/several-hosts.md: go test -v ./ipvs -args -table -rounds 20
var (
	table  = flag.Bool("table", false, "all rows, not just those with a promise")
	rounds = flag.Int("rounds", 2, "`number` of restarts or kills in a row")
)

func TestMain(m *testing.M) { exampletest.Main(m, serve) }

// serve is a process of a host. Its arguments are the address and the path of the
// handoff, which may be empty.
func serve() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	opt := lblisten.WithLB()
	if path := os.Args[2]; path != "" {
		opt = lblisten.WithHandoff(path)
	}
	ln, err := lblisten.Listen("tcp", os.Args[1], opt)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var stopping atomic.Bool
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stopping.Load() {
			w.Header().Set("Connection", "close")
		}
		time.Sleep(2 * time.Millisecond)
		fmt.Fprint(w, os.Getpid())
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	fmt.Println("ready on", ln.Addr())
	<-ctx.Done()
	ln.Close()
	<-served
	stopping.Store(true)
	time.Sleep(500 * time.Millisecond)
	srv.Shutdown(context.Background())
}

// TestIPVS runs TestInside in a network namespace, or in a user-mode Linux.
func TestIPVS(t *testing.T) {
	if os.Getenv(insideVariable) != "" {
		t.Skip("this is the inside")
	}
	if _, err := exec.LookPath("ipvsadm"); err != nil {
		t.Skip("no ipvsadm (Debian: ipvsadm)")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	most := exampletest.Limit(time.Duration(*rounds) * 2 * time.Minute) // then it ends by itself
	test := fmt.Sprintf("-u %s %s=1 LBLISTEN_TEST_SLOW=%s %s -test.run=TestInside -test.v -test.timeout=%v -rounds=%d -table=%t", exampletest.Variable, insideVariable,
		os.Getenv("LBLISTEN_TEST_SLOW"), exe, most, *rounds, *table)
	var cmd *exec.Cmd
	if _, err := os.Stat("/proc/net/ip_vs"); err == nil && os.Getuid() == 0 {
		cmd = exec.Command("unshare", "--net", "--mount", "sh", "-c", "mount -t tmpfs run /run; ip link set lo up; cd "+pwd(t)+"; env "+test+"; echo status $?")
	} else if linux, err := exec.LookPath("linux.uml"); err == nil {
		dir := exampletest.Dir(t)
		script := filepath.Join(dir, "init")
		require.NoError(t, os.WriteFile(script, []byte(`#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
mkdir -p /run/lib/modules; ln -s /usr/lib/uml/modules/$(uname -r) /run/lib/modules
ip link set lo up
modprobe -d /run -a veth ip_vs ip_vs_rr && cd `+pwd(t)+" && env "+test+`
echo status $?
echo o > /proc/sysrq-trigger
sleep 100
`), 0o755))
		needUserModeLinux(t, linux, dir)
		cmd = userModeLinux(context.Background(), linux, dir, script)
	} else {
		t.Skip("the kernel has no IPVS, or this isn't root, and there is no user-mode Linux (Debian: user-mode-linux, kmod)")
	}
	// A process of a user-mode Linux is one here as well, in the group of the first.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	p := exampletest.Run(t, cmd)
	status := p.HearWithin("status ", most)
	for _, line := range p.Said() {
		if strings.Contains(line, "rounds,") {
			t.Log(strings.TrimSpace(line))
		}
	}
	require.Equal(t, "0", strings.TrimSpace(status))
	p.Wait()
}

// userModeLinux boots a kernel that runs a script as its first process, and nothing else.
func userModeLinux(ctx context.Context, linux, dir, script string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, linux, "mem=512M", "rootfstype=hostfs", "rootflags=/", "root=/dev/root", "ro", "quiet",
		"con=null", "con0=null,fd:1", "con1=null", "ssl=null", "init="+script)
	cmd.Env = append(os.Environ(), "HOME="+dir, "TMPDIR="+dir)
	return cmd
}

// needUserModeLinux skips the test where that kernel doesn't get as far as its first
// process: it asks the processor for more than some have ("ptrace set fp regs failed").
func needUserModeLinux(t *testing.T, linux, dir string) {
	t.Helper()
	script := filepath.Join(dir, "probe")
	require.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\nmount -t proc proc /proc\necho it runs\necho o > /proc/sysrq-trigger\nsleep 100\n"), 0o755))
	ctx, cancel := context.WithTimeout(context.Background(), exampletest.Limit(time.Minute))
	defer cancel()
	cmd := userModeLinux(ctx, linux, dir, script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if strings.Contains(string(out), "it runs") {
		return
	}
	why := err
	for _, line := range strings.Split(string(out), "\n") {
		if strings.Contains(line, "regs failed") || strings.Contains(line, "Kernel panic") {
			why = errors.New(strings.TrimSpace(line))
			break
		}
	}
	t.Skipf("user-mode Linux doesn't run on this machine: %v", why)
}

func pwd(t *testing.T) string {
	dir, err := os.Getwd()
	require.NoError(t, err)
	return dir
}

func run(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	require.NoError(t, err, "%v: %s", args, out)
}

// A host is a network namespace with processes on one address.
type host struct {
	t             *testing.T
	name, address string
	handoff       string // path, "" if none
	processes     []*exampletest.Process
}

func (h *host) start() {
	h.t.Helper()
	cmd := exampletest.Unprivileged(h.t, exampletest.Command(h.t, h.address, h.handoff))
	p := exampletest.Run(h.t, exec.Command("ip", append([]string{"netns", "exec", h.name}, cmd.Args...)...))
	p.Hear("ready on ")
	h.processes = append(h.processes, p)
}

const vip = "10.77.0.1:80"

func TestInside(t *testing.T) {
	if os.Getenv(insideVariable) == "" {
		t.Skip("TestIPVS runs it")
	}
	run(t, "ip", "address", "add", "10.77.0.1/32", "dev", "lo")
	var addresses []string
	for i, name := range []string{"one", "two"} {
		link, net := fmt.Sprint("veth", i), fmt.Sprint("10.77.", i+1)
		run(t, "ip", "netns", "add", name)
		defer run(t, "ip", "netns", "delete", name)
		run(t, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
		run(t, "ip", "address", "add", net+".1/24", "dev", link)
		run(t, "ip", "link", "set", link, "up")
		run(t, "ip", "-n", name, "address", "add", net+".2/24", "dev", "eth0")
		run(t, "ip", "-n", name, "link", "set", "eth0", "up")
		run(t, "ip", "-n", name, "route", "add", "default", "via", net+".1")
		addresses = append(addresses, net+".2:8080")
	}
	t.Setenv("VIP", vip)
	t.Setenv("HOST1", addresses[0])
	t.Setenv("HOST2", addresses[1])
	run(t, "./ipvs.sh")

	restart := func(h *host) {
		h.processes[0].Stop(syscall.SIGTERM)
		h.processes = h.processes[1:]
		h.start()
	}
	drained := func(h *host) {
		run(t, "ipvsadm", "-e", "-t", vip, "-r", h.address, "-m", "-w", "0")
		restart(h)
		run(t, "ipvsadm", "-e", "-t", vip, "-r", h.address, "-m", "-w", "1")
	}
	kill := func(h *host) {
		p := h.processes[0]
		exampletest.Freeze(t, p.Pid())
		time.Sleep(100 * time.Millisecond) // of the experiment; nothing is waited for
		p.Signal(syscall.SIGKILL)
		p.Wait()
		h.processes = h.processes[1:]
		h.start()
	}
	const clients = 16
	for _, row := range []struct {
		name      string
		processes int
		handoff   bool
		do        func(*host)
		most      int // failures in a round; -1: as many as there are
	}{
		{"1 process, restarted", 1, false, restart, -1},
		{"1 process, restarted with weight 0", 1, false, drained, -1},
		{"1 process, killed", 1, false, kill, -1},
		{"2 processes, restarted", 2, false, restart, -1},
		{"2 processes, killed", 2, false, kill, -1},
		{"2 processes with handoff, restarted", 2, true, restart, 0},
		{"2 processes with handoff, killed", 2, true, kill, clients}, // what it had accepted
	} {
		if row.most < 0 && !*table {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			hosts := []*host{{t: t, name: "one", address: addresses[0]}, {t: t, name: "two", address: addresses[1]}}
			for _, h := range hosts {
				if row.handoff {
					h.handoff = filepath.Join(exampletest.Dir(t), "handoff")
				}
				for range row.processes {
					h.start()
				}
			}
			load := exampletest.StartLoad(t, clients, "http://"+vip, func() *http.Transport {
				return &http.Transport{DialContext: (&net.Dialer{Timeout: exampletest.Limit(10 * time.Second)}).DialContext}
			})
			load.Await(100)
			for i := range *rounds {
				row.do(hosts[i%2])
				load.Await(100)
			}
			answered, by, failed := load.End()
			refused := 0
			for _, err := range failed {
				if errors.Is(err, syscall.ECONNREFUSED) {
					refused++
				}
			}
			t.Logf("%s: %d rounds, %d requests, %d refused, %d failed otherwise", row.name, *rounds, answered+len(failed), refused, len(failed)-refused)
			require.GreaterOrEqual(t, len(by), 2, "both hosts answer")
			if row.most >= 0 {
				require.LessOrEqual(t, len(failed), row.most**rounds, "%v", failed)
				require.Zero(t, refused)
			}
		})
	}
}
