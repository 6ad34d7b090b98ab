package lblisten

// The handoff on a disk that is full or can't be written to, of other users, and of
// other clocks.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(filepath.Join(dir, "handoff")))
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

// A disk that is full doesn't keep a process out of a handoff: it finds the others, and
// when there is room, it is found too.
func TestHandoffDiskFullWhileRunning(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS|unix.CLONE_NEWNET) {
		return
	}
	for _, m := range modes {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher"}
		dir := filepath.Dir(job.Path)
		// Room for two directories and two processes.
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=4,mode=700"))
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
		servers[1].kill()
		servers[2].ask("accept")
		served := answered(conns)
		t.Logf("%s: %d tried, %d lost", m.name, n, n-served)
		require.Equal(t, n, served)
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "nr_inodes=100,mode=700"))
		for _, s := range append(servers[2:], startServer(t, job)) {
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
	for _, path := range []string{filepath.Join(readOnly, filepath.Base(job.Path)), filepath.Join(readOnly, "new")} {
		for _, opt := range []Option{WithRequireKernel(), WithDispatcher()} {
			_, err := Listen("tcp", job.Address, opt, WithHandoff(path))
			require.ErrorIs(t, err, unix.EROFS)
			require.ErrorContains(t, err, path)
			require.ErrorContains(t, err, job.Address)
		}
	}
	soon(t, func() bool { return openDescriptors() <= fds }, "descriptors are left over")
	for _, s := range servers {
		s.becomes(isHandedOff)
	}
	servers[0].kill()
	servers[1].ask("accept")
	served := answered(conns)
	t.Logf("%d tried, %d lost", n, n-served)
	require.Equal(t, n, served)
}

// Another user's process can't reach what is in the directory, and can't use it.
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
	require.Equal(t, os.FileMode(0o700), st.Mode().Perm())
	ids, err := processesIn(path)
	require.NoError(t, err)
	asNobody := func(worker string) string {
		cmd := exec.Command(executable(t))
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER="+worker, "LBLISTEN_TEST_PATH="+path, "LBLISTEN_TEST_FILE="+filepath.Join(path, ids[0].String()), "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return strings.TrimSpace(string(out))
	}
	require.Contains(t, asNobody("listenThere"), fmt.Sprintf("belongs to uid 0 and this process is uid %d", nobody))
	require.Contains(t, asNobody("connectThere"), "permission denied")

	// The other way round: a directory of somebody else.
	theirs := filepath.Join(filepath.Dir(path), "theirs")
	require.NoError(t, os.Mkdir(theirs, 0o700))
	require.NoError(t, os.Chown(theirs, nobody, nobody))
	_, err = Listen("tcp", "127.0.0.1:0", WithHandoff(theirs))
	require.ErrorContains(t, err, fmt.Sprintf("belongs to uid %d and this process is uid 0", nobody))
}

func listenThereWorker() {
	_, err := Listen("tcp", "127.0.0.1:0", WithHandoff(os.Getenv("LBLISTEN_TEST_PATH")))
	fmt.Println(err)
}

func connectThereWorker() {
	_, err := net.Dial("unix", os.Getenv("LBLISTEN_TEST_FILE"))
	fmt.Println(err)
}

// A process of another network namespace is told so by its Listen, before a socket moves,
// and the one that was there first goes on serving its own; also when it starts twice in
// a row, and with a keeper in the wrong namespace.
func TestHandoffOfAnotherNamespace(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("making a namespace takes unshare(1)")
	}
	for _, m := range modes {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: m.name == "dispatcher", Members: 2}
		first := startServer(t, job)
		job.Address = first.Address
		second := startServer(t, job)
		for range 2 {
			stranger := beginServer(t, job, unshare, "--net")
			stranger.hear()
			require.Contains(t, stranger.Err, job.Path+" is used by processes of another network namespace (another container?): give each its own directory")
			stranger.end()
		}
		keeper, line := startChild(t, "strayKeeper", "LBLISTEN_TEST_PATH="+job.Path)
		require.Contains(t, line, "another network namespace")
		keeper.wait()
		for _, s := range []*server{first, second} {
			s.becomes(isHandedOff)
		}
		conns := standing(t, job.Address, 40)
		first.kill()
		second.ask("accept")
		require.Equal(t, len(conns), answered(conns))
		// Two strangers that start in one instant: one of them at least is told so.
		path := handoffPath(t)
		lone := serverJob{Path: path, Address: "127.0.0.1:0", Members: 1, Network: "tcp4"}
		two := []*server{beginServer(t, lone), beginServer(t, lone, unshare, "--net", "sh", "-c", "ip link set lo up; exec \"$0\"")}
		told := 0
		for _, s := range two {
			s.hear()
			if s.Err != "" {
				require.Contains(t, s.Err, "another network namespace")
				told++
			}
		}
		require.Equal(t, 1, told)
		for _, s := range two {
			s.end()
		}
	}
}

func strayKeeperWorker() {
	runtime.LockOSThread() // the thread is in another namespace, and what it opens
	must(unix.Unshare(unix.CLONE_NEWNET))
	fmt.Println(Keep(context.Background(), os.Getenv("LBLISTEN_TEST_PATH")))
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
