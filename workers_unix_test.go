//go:build unix

package lblisten

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func init() {
	for name, w := range map[string]func(){
		"outOfDescriptors":       outOfDescriptorsWorker,       // accepts without descriptors, and with them again
		"busyWithoutDescriptors": busyWithoutDescriptorsWorker, // measures the CPU time of loops without descriptors
		"acceptsInVain":          acceptsInVainWorker,          // finds out what accept(2) does without descriptors
		"oneError":               oneErrorWorker,               // has many Accepts wait while one gets an error
		"faultServer":            faultServerWorker,            // listens and echoes, until its standard input ends
		"closeOnExec":            closeOnExecWorker,            // looks which descriptors exec leaves open
		"holdNothing":            holdNothingWorker,            // its child: prints the descriptors that it has got
	} {
		workers[name] = w
	}
}

// runWorker runs a worker in a process of its own, and returns what it prints.
func runWorker(t testing.TB, name string, env ...string) string {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(append(os.Environ(), "LBLISTEN_TEST_WORKER="+name), env...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// startWorker starts a worker, and returns it, what ends it, and the first line
// that it prints.
func startWorker(t testing.TB, name string, env ...string) (cmd *exec.Cmd, end func(), line string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd = exec.Command(self)
	cmd.Env = append(append(os.Environ(), "LBLISTEN_TEST_WORKER="+name, "GORACE=atexit_sleep_ms=0"), env...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	end = sync.OnceFunc(func() {
		late := time.AfterFunc(limit(20*time.Second), func() { cmd.Process.Kill() })
		in.Close()
		require.NoError(t, cmd.Wait())
		late.Stop()
	})
	t.Cleanup(func() {
		if t.Failed() {
			cmd.Process.Kill()
			in.Close()
			cmd.Wait()
			return
		}
		end()
	})
	line, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "a worker ended")
	return cmd, end, strings.TrimSpace(line)
}

// executable returns this program in a directory that any user can write to, where
// any user can run it.
func executable(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "lblisten")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	path := filepath.Join(dir, "lblisten.test")
	if os.Link(self, path) == nil && os.Chmod(path, 0o755) == nil {
		return path
	}
	b, err := os.ReadFile(self) // it is on another file system
	require.NoError(t, err)
	syscall.ForkLock.RLock() // what is open for writing in a process of another test can't be run
	defer syscall.ForkLock.RUnlock()
	require.NoError(t, os.WriteFile(path, b, 0o755))
	require.NoError(t, os.Chmod(path, 0o755))
	return path
}

// faultOptions are the options of a worker, by their names.
func faultOptions(names string) []Option {
	var opts []Option
	for _, name := range strings.Fields(names) {
		what, path, _ := strings.Cut(name, "=")
		switch what {
		case "kernel":
			opts = append(opts, WithRequireKernel())
		case "dispatcher":
			opts = append(opts, WithDispatcher())
		case "source":
			opts = append(opts, WithSteering(SteerSource))
		case "cpu":
			opts = append(opts, WithSteering(SteerCPU))
		case "load":
			opts = append(opts, WithSteering(SteerLoad))
		case "handoff":
			opts = append(opts, WithHandoff(path))
		default:
			panic(name)
		}
	}
	return opts
}
