//go:build unix

package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/lblisten/lblisten/internal/joining"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// start starts a parent of n processes and returns their numbers.
func start(t *testing.T, n int, args ...string) (p *exampletest.Process, addr string, pids []int) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	addr = fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
	t.Setenv("TMPDIR", exampletest.Dir(t)) // a killed parent leaves its directory
	p = exampletest.Start(t, append([]string{"-addr", addr, "-n", strconv.Itoa(n)}, args...)...)
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

// Another parent comes with the same path, and the first one goes, under load.
func TestReplacedParent(t *testing.T) {
	path := filepath.Join(exampletest.Dir(t), "handoff")
	p, addr, pids := start(t, 2, "-handoff", path)
	load := exampletest.StartLoad(t, 8, "http://"+addr, func() *http.Transport { return new(http.Transport) })
	load.Await(100)
	next := exampletest.Start(t, "-addr", addr, "-n", "2", "-handoff", path)
	pids = append(pids, hear(t, next), hear(t, next))
	p.Stop(syscall.SIGTERM)
	gone(t, pids[:2])
	load.Await(100)
	answered, by, failed := load.End()
	t.Logf("%d requests answered by %v, %d failed", answered, by, len(failed))
	failed = slices.DeleteFunc(failed, joining.TurnedAway)
	require.Empty(t, failed)
	next.Stop(syscall.SIGTERM)
}

// gone waits until the processes are.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		require.Eventually(t, func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH },
			exampletest.Limit(30*time.Second), 10*time.Millisecond, "process %d", pid)
	}
}
