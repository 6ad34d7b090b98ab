//go:build unix && !aix

package lblisten

// The files of a handoff.

import (
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Bad paths are refused with an error that names them and says what to do, and
// nothing is harmed.
func TestHandoffBadPath(t *testing.T) {
	noLeaks(t)
	dir := filepath.Dir(handoffPath(t))
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("precious"), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "dir"), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "open"), 0o700))
	require.NoError(t, os.Chmod(filepath.Join(dir, "open"), 0o777))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "locked.lock"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pid.lock"), []byte("12345\n"), 0o600))
	require.NoError(t, os.Symlink(file, filepath.Join(dir, "link.lock")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "closed"), 0o500))
	for _, c := range []struct{ path, want string }{
		{"", "the path is empty"},
		{"a\x00b", "NUL"},
		{filepath.Join(dir, strings.Repeat("x", 100)), "choose a shorter one"},
		{filepath.Join(dir, "none", "lb"), "no such file or directory"},
		{filepath.Join(file, "lb"), "not a directory"},
		{filepath.Join(dir, "dir"), "is not a unix socket: choose another path"},
		{file, "is not a unix socket: choose another path"},
		{filepath.Join(dir, "pid"), "is not the lock file of a handoff"},
		{filepath.Join(dir, "open", "lb"), "can be written to by others"},
		{filepath.Join(dir, "locked"), "lock file"},
		{filepath.Join(dir, "link"), "lock file"},
		{filepath.Join(dir, "closed", "lb"), "permission denied"},
	} {
		if c.want == "permission denied" && os.Geteuid() == 0 {
			continue // TestUnprivileged has this case
		}
		ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(c.path))
		require.ErrorContains(t, err, c.want, "%q", c.path)
		require.ErrorContains(t, err, "127.0.0.1:0")
		require.ErrorContains(t, err, "WithHandoff")
		require.Nil(t, ln)
		require.IsType(t, (*net.OpError)(nil), err)
	}
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
}

// A path on which another program listens is left to it.
func TestHandoffPathOfAnotherProgram(t *testing.T) {
	beside(t)
	for _, name := range []func(string) string{func(p string) string { return p }, newPath} {
		t.Run("socket"+filepath.Ext(name("socket")), func(t *testing.T) {
			beside(t)
			path := handoffPath(t)
			other, err := net.Listen("unix", name(path))
			require.NoError(t, err)
			ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
			require.NoError(t, err)
			require.ErrorContains(t, ln.(*Listener).Info().Reason, "another program listens on "+name(path))
			require.NoError(t, ln.Close())
			require.FileExists(t, name(path))
			other.Close()
		})
	}
}

// A whole set that starts anew after a crash finds what the crash left: a socket
// file that nobody listens on, and a lock file.
func TestHandoffStaleFiles(t *testing.T) {
	noLeaks(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	servers := []*server{startServer(t, job), startServer(t, job)}
	for _, s := range servers {
		s.kill()
	}
	require.FileExists(t, lockPath(job.Path))
	os.Remove(newPath(job.Path)) // of a hub that died between bind and rename
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: newPath(job.Path)})
	require.NoError(t, err)
	ln.SetUnlinkOnClose(false)
	ln.Close()
	job.Address = "127.0.0.1:0"
	a := startServer(t, job)
	job.Address = a.Address
	b := startServer(t, job)
	a.becomes(isHandedOff)
	b.becomes(isHandedOff)
	b.close()
	a.close()
	require.NoFileExists(t, job.Path)
	require.NoFileExists(t, newPath(job.Path))
	require.FileExists(t, lockPath(job.Path))
}

// Somebody removes the files of a set that lives: it finds together again.
func TestHandoffFilesRemoved(t *testing.T) {
	beside(t)
	for _, what := range []func(string) string{func(p string) string { return p }, lockPath} {
		t.Run(filepath.Ext(what("socket")), func(t *testing.T) {
			beside(t)
			job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
			a := startServer(t, job)
			job.Address = a.Address
			b := startServer(t, job)
			a.becomes(isHandedOff)
			require.NoError(t, os.Remove(what(job.Path)))
			c := startServer(t, job)
			hubs := 0
			for _, s := range []*server{a, b, c} {
				s.becomes(isHandedOff)
			}
			require.Eventually(t, func() bool {
				hubs = 0
				for _, s := range []*server{a, b, c} {
					if r := s.ask("report"); r.Hub && isHandedOff(r) {
						hubs++
					}
				}
				return hubs == 1
			}, limit(5*time.Second), 20*time.Millisecond, "%+v %+v %+v", &a.serverReport, &b.serverReport, &c.serverReport)
			conns := standing(t, job.Address, 60)
			a.kill()
			b.kill()
			c.ask("accept")
			require.Equal(t, len(conns), answered(conns))
		})
	}
}

// The directory of a handoff that vanishes while it is in use takes nothing with
// it: the processes go on with what they hold, and when the directory is there
// again, they find together.
func TestHandoffDirectoryVanishes(t *testing.T) {
	beside(t)
	inHandoffModes(t, func(t *testing.T, dispatcher bool) {
		job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0", Dispatcher: dispatcher, Members: 2}
		dir := filepath.Dir(job.Path)
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
		require.NoError(t, os.RemoveAll(dir))
		servers[1].becomes(func(r serverReport) bool { return !isHandedOff(r) })
		require.Contains(t, servers[1].Reason, "no such file or directory")
		servers[0].kill()
		other := beginServer(t, job)
		other.hear()
		require.Contains(t, other.Err, dir)
		servers[1].ask("accept")
		require.Equal(t, n, answered(conns))

		require.NoError(t, os.Mkdir(dir, 0o700))
		servers = append(servers[1:], startServer(t, job))
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		for _, c := range conns {
			c.Close()
		}
		more := standing(t, job.Address, n)
		servers[0].ask("close")
		servers[1].ask("accept")
		servers[2].ask("accept")
		served := answered(more)
		t.Logf("%d tried, %d lost; one of three processes was killed while the directory was gone", 2*n, n-served)
		require.Equal(t, n, served)
	})
}

// A unix socket's file stays while another process accepts from the socket.
func TestHandoffUnixSocketFile(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	app := filepath.Join(filepath.Dir(path), "app.sock")
	a, err := Listen("unix", app, WithHandoff(path))
	require.NoError(t, err)
	b := startServer(t, serverJob{Path: path, Network: "unix", Address: app})
	require.NoError(t, a.Close())
	c := dialTest(t, a.Addr())
	_, err = c.Write([]byte("x"))
	require.NoError(t, err)
	b.ask("accept")
	require.Equal(t, 1, answered([]net.Conn{c}))
	c.Close()
	b.close()
	require.NoFileExists(t, app)
}

// A unix socket's file goes with the last process, also right after the others
// were killed.
func TestHandoffUnixSocketFileOfTheLast(t *testing.T) {
	noLeaks(t) // not beside others: the last one to close waits a second for an answer, and leaves the file without
	path := handoffPath(t)
	app := filepath.Join(filepath.Dir(path), "app.sock")
	job := serverJob{Path: path, Network: "unix", Address: app, Members: 1}
	for range count(20, 4) {
		var others []*server
		first := rand.IntN(2) == 0 // and the hub
		if !first {
			others = append(others, startServer(t, job))
		}
		a, err := Listen("unix", app, WithHandoff(path))
		require.NoError(t, err)
		for _, b := range append(others, startServer(t, job)) {
			b.kill()
		}
		require.NoError(t, a.Close())
		require.NoFileExists(t, app, "first: %v", first)
	}
}

// FuzzLock: a lock file is taken for one only if it is, and what a hub writes
// into one is read again, whatever an earlier one has left there.
func FuzzLock(f *testing.F) {
	for _, s := range []string{"", "lblisten handoff, processes:    1\n", "lblisten handoff, processes: 9999\n", "lblisten handoff, processes: 10000\n",
		"lblisten handoff, processes:   -3\n", "lblisten handoff, processes: \n", "12345\n", "lblisten handoff, processes: 5\nmore"} {
		f.Add([]byte(s), uint16(3))
	}
	path := filepath.Join(f.TempDir(), "lb.sock")
	f.Fuzz(func(t *testing.T, b []byte, n uint16) {
		require.NoError(t, os.WriteFile(lockPath(path), b, 0o600))
		lock, err := openLock(path)
		if err != nil {
			require.ErrorContains(t, err, "is not the lock file of a handoff")
			return
		}
		defer lock.Close()
		if len(b) > 0 {
			before, ours := readCount(lock)
			require.True(t, ours)
			require.LessOrEqual(t, before, 9999)
		}
		processes := int(n) % (handoffPeers + 1)
		(&hub{lock: lock}).writeCount(processes)
		got, ours := readCount(lock)
		require.True(t, ours)
		require.Equal(t, processes, got)
		again, err := openLock(path)
		require.NoError(t, err)
		require.NoError(t, again.Close())
	})
}
