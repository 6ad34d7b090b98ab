package lblisten

// The handoff on a disk that is full or can't be written to, of other users, and of
// other clocks.

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	beside(t)
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system takes root")
	}
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

// A disk that is full when the hub dies costs nothing: nobody can be the hub, so
// everybody serves everything, and when there is room again, all find together.
func TestHandoffDiskFullWhileRunning(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS|unix.CLONE_NEWNET) {
		return
	}
	for _, m := range modes {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher"}
		dir := filepath.Dir(job.Path)
		// Room for the directory, the lock and the socket, but not for another one.
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=3,mode=700"))
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		var servers []*server
		for range 3 {
			servers = append(servers, startServer(t, job))
			job.Address = servers[0].Address
		}
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		n := count(300, 30)
		conns := standing(t, job.Address, n)
		servers[0].kill()
		servers[1].becomes(func(r serverReport) bool { return strings.Contains(r.Reason, "no space left on device") })
		servers[1].ask("accept")
		served := answered(conns)
		t.Logf("%s: %d tried, %d lost", m.name, n, n-served)
		require.Equal(t, n, served)
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "nr_inodes=100,mode=700"))
		for _, s := range append(servers[1:], startServer(t, job)) {
			s.becomes(isHandedOff)
		}
		for _, c := range conns {
			c.Close()
		}
	}
}

// A process that may only read the file system of the handoff's path gets an
// error that says so, before it opens anything, and the others go on.
func TestHandoffReadOnly(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS|unix.CLONE_NEWNET) {
		return
	}
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	servers := []*server{startServer(t, job)}
	job.Address = servers[0].Address
	servers = append(servers, startServer(t, job))
	n := count(300, 30)
	conns := standing(t, job.Address, n)
	readOnly := filepath.Dir(handoffPath(t))
	require.NoError(t, unix.Mount(filepath.Dir(job.Path), readOnly, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(readOnly, unix.MNT_DETACH) })
	require.NoError(t, unix.Mount("", readOnly, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	fds := openDescriptors()
	for _, path := range []string{filepath.Join(readOnly, "lb.sock"), filepath.Join(readOnly, "new.sock")} {
		for _, opt := range []Option{WithRequireKernel(), WithDispatcher()} {
			_, err := Listen("tcp", job.Address, opt, WithHandoff(path))
			require.ErrorIs(t, err, unix.EROFS)
			require.ErrorContains(t, err, path)
			require.ErrorContains(t, err, job.Address)
		}
	}
	require.Equal(t, fds, openDescriptors())
	for _, s := range servers {
		s.becomes(isHandedOff)
	}
	servers[0].kill()
	servers[1].ask("accept")
	served := answered(conns)
	t.Logf("%d tried, %d lost", n, n-served)
	require.Equal(t, n, served)
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

// Processes whose monotonic clocks differ by ten days, as in containers that were
// moved, are one set of a handoff: nothing that goes between them is a time. (The
// clock of a running process can't be moved without the machine's: a time
// namespace is entered by exec, and the wall clock has none.)
func TestHandoffOfOtherClocks(t *testing.T) {
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("making a time namespace takes unshare(1)")
	}
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	shifted := []string{unshare, "--time", "--monotonic", "864000", "--boottime", "864000", "--fork", "--kill-child"}
	out, err := exec.Command(unshare, append(slices.Clone(shifted[1:]), "cat", "/proc/uptime")...).CombinedOutput()
	if err != nil {
		t.Skipf("no time namespace: %s", out)
	}
	var uptime float64
	_, err = fmt.Sscan(string(out), &uptime)
	require.NoError(t, err)
	require.Greater(t, uptime, 864000.0)
	for _, m := range modes {
		for _, dead := range []int{0, 1} {
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher"}
			servers := []*server{startServer(t, job)}
			job.Address = servers[0].Address
			servers = append(servers, beginServer(t, job, shifted...))
			servers[1].hear()
			for _, s := range servers {
				s.becomes(isHandedOff)
			}
			n := count(300, 30)
			conns := standing(t, job.Address, n)
			servers[dead].kill()
			servers[1-dead].ask("accept")
			served := answered(conns)
			t.Logf("%s: %d tried, %d lost", m.name, n, n-served)
			require.Equal(t, n, served)
			for _, c := range conns {
				c.Close()
			}
			servers[1-dead].close()
		}
	}
}
