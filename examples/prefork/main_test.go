//go:build unix

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// start starts a parent of n processes and returns their numbers.
func start(t *testing.T, n int) (p *exampletest.Process, addr string, pids []int) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	addr = fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
	t.Setenv("TMPDIR", exampletest.Dir(t)) // a killed parent leaves its directory
	p = exampletest.Start(t, "-addr", addr, "-n", strconv.Itoa(n))
	for range n {
		pids = append(pids, hear(t, p))
	}
	return p, addr, pids
}

// hear waits for the next process that listens.
func hear(t *testing.T, p *exampletest.Process) int {
	pid, _, _ := strings.Cut(p.Hear(ready), " ")
	n, err := strconv.Atoi(pid)
	require.NoError(t, err)
	return n
}

// One of three processes stands still and is killed, with connections in its queue.
// Each is answered by another one, and the parent starts a third.
func TestKilledChild(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux tells when all threads of a stopped process stand still, so that it accepts nothing more")
	}
	p, addr, pids := start(t, 3)
	require.NoError(t, syscall.Kill(pids[0], syscall.SIGSTOP))
	require.Eventually(t, func() bool { return standsStill(pids[0]) }, exampletest.Limit(30*time.Second), time.Millisecond)
	defer syscall.Kill(pids[0], syscall.SIGKILL)
	conns := make([]net.Conn, 90)
	for i := range conns {
		c, err := net.Dial("tcp", addr)
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(exampletest.Limit(30*time.Second))))
		_, err = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		require.NoError(t, err)
		conns[i] = c
	}
	require.NoError(t, syscall.Kill(pids[0], syscall.SIGKILL))
	for i, c := range conns {
		answer, err := io.ReadAll(c)
		require.NoError(t, err, "connection %d", i)
		require.Contains(t, string(answer), "200 OK", "connection %d", i)
		require.NotContains(t, string(answer), strconv.Itoa(pids[0]), "connection %d", i)
	}
	require.NotContains(t, pids, hear(t, p))
	p.Stop(syscall.SIGTERM)
	gone(t, pids)
}

// All processes are replaced under load, then the parent is killed. No request
// fails, and nobody listens any more.
func TestReplacedUnderLoad(t *testing.T) {
	p, addr, pids := start(t, 2)
	load := exampletest.StartLoad(t, 8, "http://"+addr, func() *http.Transport { return new(http.Transport) })
	load.Await(100)
	p.Signal(syscall.SIGHUP)
	pids = append(pids, hear(t, p), hear(t, p))
	gone(t, pids[:2])
	load.Await(100)
	answered, by, failed := load.End()
	t.Logf("%d requests answered, %d failed", answered, len(failed))
	require.Empty(t, failed)
	for _, pid := range pids {
		require.Contains(t, by, strconv.Itoa(pid))
	}
	p.Signal(os.Kill)
	p.Wait()
	require.Eventually(t, func() bool { // not gone: an orphan is whose it comes to, who may leave it a zombie
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}, exampletest.Limit(30*time.Second), 10*time.Millisecond)
}

// gone waits until the processes are.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		require.Eventually(t, func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH },
			exampletest.Limit(30*time.Second), 10*time.Millisecond, "process %d", pid)
	}
}

// standsStill reports whether every thread of a process is stopped.
func standsStill(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, stat := range threads {
		b, err := os.ReadFile(stat)
		if err != nil || !strings.Contains(string(b), ") T ") {
			return false
		}
	}
	return len(threads) > 0
}
