//go:build unix

package lblisten

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// openDescriptors counts the descriptors of this process.
func openDescriptors() int {
	n := 0
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}

// passingErrors are what accept(2) fails with for now.
var passingErrors = []error{
	os.NewSyscallError("accept", unix.ECONNABORTED), os.NewSyscallError("accept", unix.EMFILE), os.NewSyscallError("accept", unix.ENFILE),
	os.NewSyscallError("accept", unix.ENOBUFS), os.NewSyscallError("accept", unix.ENOMEM), os.NewSyscallError("accept", unix.EINTR),
}

func isRefused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// onFD runs f on the descriptor of a socket, and returns its error.
func onFD(c syscall.RawConn, f func(fd uintptr) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(fd) }); cerr != nil {
		return cerr
	}
	return err
}

// executable returns a copy of the test binary that any user can run, in a
// directory that any user can write to.
func executable(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	in, err := os.Open(self)
	require.NoError(t, err)
	defer in.Close()
	dir, err := os.MkdirTemp("", "lblisten")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	path := filepath.Join(dir, "lblisten.test")
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	require.NoError(t, err)
	_, err = io.Copy(out, in)
	require.NoError(t, err)
	require.NoError(t, out.Close())
	require.NoError(t, os.Chmod(path, 0o755))
	return path
}

// must is for workers.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// setFileLimit sets the limit of open files.
func setFileLimit(n int) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	assign(&l.Cur, n)
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
}

// assign is for fields whose type differs between systems.
func assign[T int64 | uint64](p *T, n int) { *p = T(n) }

// useUpDescriptors opens files until no descriptor is left.
func useUpDescriptors() (files []*os.File) {
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 128, Max: 128}))
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			return files
		}
		files = append(files, f)
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

// Out of descriptors, Accept fails with EMFILE, unchanged, and nothing is lost:
// what waits is served as soon as there are descriptors again, also what a
// member left that closed meanwhile.
func TestOutOfDescriptors(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		require.Equal(t, "ok\n", runWorker(t, "outOfDescriptors", "LBLISTEN_TEST_MODE="+m.name))
	})
}

func outOfDescriptorsWorker() {
	opt := WithDispatcher()
	if os.Getenv("LBLISTEN_TEST_MODE") == "kernel" {
		opt = WithRequireKernel()
	}
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 3, opt)
	must(err)
	ls := g.Listeners()
	const clients = 24
	for range clients {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	waiting := make(chan error)
	must(ls[1].Close()) // this one finds a descriptor to wait with

	files := useUpDescriptors()
	must(ls[2].Close()) // this one doesn't
	for range 3 {
		if c, err := ls[0].Accept(); !errors.Is(err, unix.EMFILE) || c != nil {
			panic(fmt.Sprintf("Accept returned %v, want EMFILE", err))
		} else if _, ok := err.(*net.OpError); !ok {
			panic(fmt.Sprintf("Accept returned a %T", err))
		}
	}
	if _, err := Listen("tcp", "127.0.0.1:0", opt); !errors.Is(err, unix.EMFILE) {
		panic(fmt.Sprintf("Listen returned %v, want EMFILE", err))
	}
	for _, f := range files {
		f.Close()
	}
	go func() {
		for range clients {
			if _, err := ls[0].Accept(); err != nil {
				waiting <- err
			}
		}
		close(waiting)
	}()
	select {
	case err := <-waiting:
		must(err)
	case <-time.After(limit(10 * time.Second)):
		panic(fmt.Sprintf("%d of %d are not served: %+v", clients-int(ls[0].Stats().Accepted), clients, g.Stats()))
	}
	must(g.Close())
	fmt.Println("ok")
}

// nobody is a user without any privilege.
const nobody = 65534

// TestUnprivileged runs what an ordinary user does as one, when the tests are
// run by root.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: all tests are run by an ordinary user already")
	}
	path := executable(t)
	cmd := exec.Command(path, "-test.v", "-test.run="+strings.Join([]string{
		"^TestSiblingInheritsQueue", "TestBlockedHeirIsWoken", "TestCloseInAnyOrder", "TestJoinAndLeaveUnderLoad",
		"TestBalance", "TestConflicts", "TestHTTP", "TestUnixSocket", "TestSoak", "TestHandoff.*", "TestConformance", "TestConn"}, "$|^"))
	cmd.Dir = filepath.Dir(path)
	cmd.Env = append(os.Environ(), "TMPDIR="+cmd.Dir, "HOME="+cmd.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestSiblingInheritsQueue/", "nothing was run: %s", out)
	require.Contains(t, string(out), "--- PASS: TestHandoffExperiment", "nothing was run: %s", out)
	require.NotContains(t, string(out), "TestUnprivileged runs it", "%s", out)
	for _, line := range strings.Split(string(out), "\n") {
		if _, tally, ok := strings.Cut(line, "conformance, "); ok {
			t.Log("conformance, " + tally)
		}
	}
	t.Logf("%d tests passed as uid %d", strings.Count(string(out), "--- PASS"), nobody)
}

// An error of a shared socket reaches one of the Accepts that wait, not all.
func TestOneErrorReachesOneAccept(t *testing.T) {
	modes[0].need(t)
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "oneError"))
}

func oneErrorWorker() {
	setRetryAfter(time.Hour)
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 12, WithRequireKernel())
	must(err)
	ls := g.Listeners()
	for !ownQueued(ls[0]) {
		_, err := net.Dial("tcp", g.Addr().String())
		must(err)
	}
	// Everybody else has an empty queue and waits.
	for _, l := range ls[1:] {
		for ownQueued(l) {
			_, err := l.Accept()
			must(err)
		}
	}
	errs := make(chan error, len(ls))
	for _, l := range ls[1:] {
		go func() {
			_, err := l.Accept()
			errs <- err
		}()
		for waiting(l) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	files := useUpDescriptors()
	must(ls[0].Close())
	if err := <-errs; !errors.Is(err, unix.EMFILE) {
		panic(fmt.Sprintf("Accept returned %v, want EMFILE", err))
	}
	time.Sleep(limit(100 * time.Millisecond))
	if len(errs) != 0 {
		panic(fmt.Sprintf("%d more Accepts returned: %v", len(errs), <-errs))
	}
	runtime.KeepAlive(files) // a file that is collected is closed
	fmt.Println("ok")
}
