package lblisten

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A full disk doesn't keep anybody from listening: the handoff is tried again
// until there is room.
func TestHandoffDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system takes root")
	}
	noLeaks(t)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=diskFull", "LBLISTEN_TEST_DIR="+filepath.Dir(handoffPath(t)), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "ok\n", string(out))
}

func diskFullWorker() {
	dir := os.Getenv("LBLISTEN_TEST_DIR")
	check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	check(unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=1,mode=700"))
	begin := time.Now()
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(filepath.Join(dir, "lb.sock")))
	check(err)
	if took := time.Since(begin); took > 2*exchangeTime+limit(500*time.Millisecond) {
		panic(fmt.Sprintf("Listen took %v", took))
	}
	l := ln.(*Listener)
	if why := l.Info().Reason; !errors.Is(why, unix.ENOSPC) {
		panic(fmt.Sprintf("the reason is %v, want ENOSPC", why))
	}
	_, err = net.Dial("tcp", ln.Addr().String())
	check(err)
	_, err = ln.Accept()
	check(err)
	check(unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "nr_inodes=100,mode=700"))
	for begin := time.Now(); !strings.Contains(l.Info().Reason.Error(), "no other process"); time.Sleep(time.Millisecond) {
		if time.Since(begin) > limit(5*time.Second) {
			panic(l.Info().Reason)
		}
	}
	check(ln.Close())
	fmt.Println("ok")
}

// Another user's process gets nothing from the hub, even where the file's mode
// lets it connect, and can't use another user's path.
func TestHandoffOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("being two users takes root")
	}
	noLeaks(t)
	path := handoffPath(t)
	require.NoError(t, os.Chmod(filepath.Dir(path), 0o755))
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer ln.Close()
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	asNobody := func(worker string) string {
		cmd := exec.Command(executable(t))
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER="+worker, "LBLISTEN_TEST_PATH="+path, "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return strings.TrimSpace(string(out))
	}
	require.Contains(t, asNobody("listenThere"), fmt.Sprintf("belongs to uid 0, this process is uid %d", nobody))
	require.Contains(t, asNobody("connectThere"), "permission denied")
	require.NoError(t, os.Chmod(path, 0o666))
	require.Equal(t, "0 bytes, then it was closed", asNobody("connectThere"))

	// The other way round: a directory of somebody else.
	require.NoError(t, os.Chown(filepath.Dir(path), nobody, nobody))
	_, err = Listen("tcp", "127.0.0.1:0", WithHandoff(filepath.Join(filepath.Dir(path), "other.sock")))
	require.ErrorContains(t, err, fmt.Sprintf("belongs to uid %d", nobody))
	require.NoError(t, os.Chown(filepath.Dir(path), 0, 0))
}

func listenThereWorker() {
	_, err := Listen("tcp", "127.0.0.1:0", WithHandoff(os.Getenv("LBLISTEN_TEST_PATH")))
	fmt.Println(err)
}

func connectThereWorker() {
	c, err := net.Dial("unix", os.Getenv("LBLISTEN_TEST_PATH"))
	if err != nil {
		fmt.Println(err)
		return
	}
	c.Write((&frame{kind: frameHello, n: handoffHighest, process: newID(), at: place{network: helloName}}).append(nil))
	c.SetReadDeadline(time.Now().Add(limit(5 * time.Second)))
	b, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		fmt.Println("it wasn't closed")
		return
	}
	fmt.Printf("%d bytes, then it was closed\n", len(b))
}
