//go:build unix

package lblisten

// What tests use on unix, and the tests that root runs once more as an ordinary user.

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

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

func isRefused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// passingErrors are what accept(2) fails with for now.
var passingErrors = []error{
	os.NewSyscallError("accept", unix.ECONNABORTED), os.NewSyscallError("accept", unix.EMFILE), os.NewSyscallError("accept", unix.ENFILE),
	os.NewSyscallError("accept", unix.ENOBUFS), os.NewSyscallError("accept", unix.ENOMEM), os.NewSyscallError("accept", unix.EINTR),
}

// onFD runs f on the descriptor of a socket, and returns its error.
func onFD(c syscall.RawConn, f func(fd uintptr) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(fd) }); cerr != nil {
		return cerr
	}
	return err
}

// connect is connect(2), which a signal interrupts on some systems (of gVisor's it is seen)
// and which goes on then: the socket is writable when it has ended.
func connect(fd int, to unix.Sockaddr) error {
	err := unix.Connect(fd, to)
	if err != unix.EINTR {
		return err
	}
	for err == unix.EINTR {
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
	}
	if err != nil {
		return err
	}
	number, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && number != 0 {
		err = syscall.Errno(number)
	}
	return err
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

// handoffPath returns a path for a handoff, in a directory of the test's.
func handoffPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "handoff")
}

// nobody is a user without any privilege.
const nobody = 65534

// TestUnprivileged runs what an ordinary user does as one, when the tests are
// run by root.
func TestUnprivileged(t *testing.T) {
	beside(t)
	if os.Geteuid() != 0 {
		t.Skip("not root: all tests are run by an ordinary user already")
	}
	path := executable(t)
	tests := []string{"TestSiblingInheritsQueue", "TestNoBPFWithoutCapability"}
	if testing.Short() { // the modes that root skips; the rest of the handoff root has tried once
		tests = append(tests, "TestHandoffExperiment", "TestKeeperKeeps", "TestConformance$/^(handoff.*|kernel_that_inherits)")
	} else {
		tests = append(tests, "TestHandoff.*", "Test.*Keeper.*", "TestBlockedHeirIsWoken", "TestCloseInAnyOrder", "TestJoinAndLeaveUnderLoad", "TestBalance", "TestConflicts", "TestJoinAndLeaveWhileSteering",
			"TestSurplusSocketsAreRetired", "TestUsersProgramStays", "TestDuplicateIsNoStranger", "TestHunt.*", "TestHTTP", "TestUnixSocket", "TestSoak", "TestConformance", "TestConn")
	}
	cmd := exec.Command(path, "-test.v", "-test.run=^"+strings.Join(tests, "$|^")+"$")
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

// closeDescriptor closes a socket behind package net's back.
func closeDescriptor(c syscall.RawConn) { c.Control(func(fd uintptr) { unix.Close(int(fd)) }) }
