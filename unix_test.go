//go:build unix

package lblisten

import (
	"io"
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
		"TestBalance", "TestConflicts", "TestHTTP", "TestUnixSocket$"}, "$|^"))
	cmd.Dir = filepath.Dir(path)
	cmd.Env = append(os.Environ(), "TMPDIR="+cmd.Dir, "HOME="+cmd.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestSiblingInheritsQueue/", "nothing was run: %s", out)
	t.Logf("%d tests passed as uid %d", strings.Count(string(out), "--- PASS"), nobody)
}
