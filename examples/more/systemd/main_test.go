//go:build linux

package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// activate starts the service on a socket as systemd does. The number of the
// process has to be in its environment, and a shell is what knows it beforehand.
func activate(t *testing.T, socket *os.File) *exampletest.Process {
	t.Helper()
	service := exampletest.Command(t)
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, service.Path)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{socket} // descriptor 3
	p := exampletest.Run(t, cmd)
	p.Hear("ready on ")
	return p
}

// The service stops, or is killed, before the next one starts. What comes meanwhile
// waits in the socket, and the next one answers it. While it stops under load,
// nothing fails either.
func TestRestart(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	socket, err := ln.(*net.TCPListener).File()
	require.NoError(t, err)
	addr := ln.Addr().String()
	ln.Close()
	defer socket.Close()

	p := activate(t, socket)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		load := exampletest.StartLoad(t, 8, "http://"+addr, func() *http.Transport { return new(http.Transport) })
		load.Await(200)
		if sig == syscall.SIGKILL {
			_, _, failed := load.End() // it would die with the process
			require.Empty(t, failed)
		}
		p.Signal(sig)
		p.Wait()
		conns := exampletest.Standing(t, addr, 50)
		p = activate(t, socket)
		for _, answer := range exampletest.Answers(t, conns) {
			require.Equal(t, fmt.Sprint(p.Pid()), answer, "after %v", sig)
		}
		if sig == syscall.SIGTERM {
			load.Await(200)
		}
		answered, by, failed := load.End()
		t.Logf("%v: %d requests answered by %v, %d failed", sig, answered, by, len(failed))
		require.Empty(t, failed)
	}
	p.Stop(syscall.SIGTERM)
}

// systemd's own tool starts it with the first connection.
func TestSocketActivate(t *testing.T) {
	tool, err := exec.LookPath("systemd-socket-activate")
	if err != nil {
		t.Skip("no systemd-socket-activate (Debian: systemd)")
	}
	addr := fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
	p := exampletest.Run(t, exec.Command(tool, "-E", exampletest.Variable, "-l", addr, exampletest.Command(t).Path))
	p.Hear("Listening on ")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: exampletest.Limit(20 * time.Second)}
	answer, err := exampletest.Get(client, "http://"+addr)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprint(p.Pid()), answer)
	p.Stop(syscall.SIGTERM)
}

// The units are what systemd understands.
func TestUnits(t *testing.T) {
	tool, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze (Debian: systemd)")
	}
	dir, args := t.TempDir(), []string{"verify", "--man=no"}
	for _, name := range []string{"lblisten.socket", "lblisten.service"} {
		unit, err := os.ReadFile(name)
		require.NoError(t, err)
		// The program must be there.
		unit = []byte(strings.ReplaceAll(string(unit), "/usr/local/bin/lblisten-systemd", exampletest.Command(t).Path))
		args = append(args, filepath.Join(dir, name))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), unit, 0o644))
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), "lblisten", "%s", out) // a key that it doesn't know is no error to it
}
