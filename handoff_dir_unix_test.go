//go:build unix && !aix

package lblisten

// The directory of a handoff.

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
	require.NoError(t, os.Mkdir(filepath.Join(dir, "group"), 0o750))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "open"), 0o700))
	require.NoError(t, os.Chmod(filepath.Join(dir, "open"), 0o777))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "private"), 0o700))
	require.NoError(t, os.Symlink(filepath.Join(dir, "private"), filepath.Join(dir, "link")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "closed"), 0o500))
	for _, c := range []struct{ path, want string }{
		{"", "the path is empty"},
		{"a\x00b", "NUL"},
		{"handoff", `"handoff" is relative`},
		{"./handoff", "is relative"},
		{"@handoff", "is no path of a directory"},
		{"~/handoff", "is no path of a directory"},
		{filepath.Join(dir, strings.Repeat("x", 100)), "choose a shorter path"},
		{filepath.Join(dir, "none", "lb"), "make its parent (install -d -m 755 " + filepath.Join(dir, "none") + ")"},
		{filepath.Join(dir, "none", "lb"), "RuntimeDirectory="},
		{filepath.Join(file, "lb"), "not a directory"},
		{file, "is not a directory, and a handoff needs one"},
		{filepath.Join(dir, "link"), "is not a directory, and a handoff needs one"},
		{filepath.Join(dir, "group"), "has mode 0750, and a handoff's directory is its user's alone (0700)"},
		{filepath.Join(dir, "open"), "such as " + filepath.Join(dir, "open", "lblisten")},
		{filepath.Join(dir, "closed", "lb"), "permission denied"},
	} {
		if c.want == "permission denied" && os.Geteuid() == 0 {
			continue // TestUnprivileged has this case
		}
		for _, opt := range []Option{WithLB(), WithDispatcher()} {
			ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(c.path), opt)
			require.ErrorContains(t, err, c.want, "%q", c.path)
			require.ErrorContains(t, err, "127.0.0.1:0")
			require.ErrorContains(t, err, "WithHandoff")
			require.Nil(t, ln)
			require.IsType(t, (*net.OpError)(nil), err)
		}
	}
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))
	for _, name := range []string{"private", "group", "open", "closed"} {
		entries, err := os.ReadDir(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Empty(t, entries)
	}
	// A path that fits, however it is spelled, in a directory that everybody may write to.
	a, err := Listen("tcp", "127.0.0.1:0", WithHandoff(filepath.Join(dir, "open", "lblisten")))
	require.NoError(t, err)
	b2, err := Listen("tcp", a.Addr().String(), WithHandoff(dir+"//open/./lblisten/"))
	require.NoError(t, err)
	require.NoError(t, b2.Close())
	require.NoError(t, a.Close())
}

// What isn't a process's in the directory is left alone; the file of a dead one is
// removed.
func TestHandoffStaleFiles(t *testing.T) {
	noLeaks(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	servers := []*server{startServer(t, job), startServer(t, job)}
	for _, s := range servers {
		s.kill()
	}
	name := func(s string) string { return filepath.Join(job.Path, s) }
	require.NoError(t, os.WriteFile(name("README"), nil, 0o600))
	require.NoError(t, os.WriteFile(name("0123456789abcdef"), nil, 0o600)) // no socket
	other, err := net.Listen("unix", name("other.sock"))
	require.NoError(t, err)
	defer other.Close()
	for _, young := range []bool{true, false} { // of processes that died between bind and rename
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: name("." + newID().String())})
		require.NoError(t, err)
		ln.SetUnlinkOnClose(false)
		ln.Close()
		if !young {
			before := time.Now().Add(-time.Hour)
			require.NoError(t, os.Chtimes(ln.Addr().String(), before, before))
		}
	}
	a := startServer(t, job)
	job.Address = a.Address
	b := startServer(t, job)
	a.becomes(isHandedOff)
	b.becomes(isHandedOff)
	soon(t, func() bool {
		entries, err := os.ReadDir(job.Path)
		return err == nil && len(entries) == 2+4
	}, "files of dead processes are there still")
	b.close()
	a.close()
	entries, err := os.ReadDir(job.Path)
	require.NoError(t, err)
	require.Len(t, entries, 4)
}

// Somebody removes the file of a process that lives: it announces itself again.
func TestHandoffFileRemoved(t *testing.T) {
	beside(t)
	job := serverJob{Path: handoffPath(t), Address: "127.0.0.1:0"}
	a := startServer(t, job)
	job.Address = a.Address
	b := startServer(t, job)
	a.becomes(isHandedOff)
	entries, err := os.ReadDir(job.Path)
	require.NoError(t, err)
	for _, e := range entries {
		require.NoError(t, os.Remove(filepath.Join(job.Path, e.Name())))
	}
	soon(t, func() bool {
		entries, err := os.ReadDir(job.Path)
		return err == nil && len(entries) == 2
	}, "they aren't announced again")
	c := startServer(t, job)
	for _, s := range []*server{a, b, c} {
		s.becomes(isHandedOff)
	}
	conns := standing(t, job.Address, 60)
	a.kill()
	b.kill()
	c.ask("accept")
	require.Equal(t, len(conns), answered(conns))
}

// The directory of a handoff that vanishes while it is in use takes nothing with
// it: the processes keep their links, and make it again.
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
		n := queued(count(300, 30), queues(dispatcher, 6))
		conns := standing(t, job.Address, n)
		soon(t, func() bool { return os.RemoveAll(dir) == nil }, "who looks meanwhile announces itself again") // with what it is in
		other := beginServer(t, job)
		other.hear()
		require.Contains(t, other.Err, "make its parent (install -d -m 755 "+dir)
		time.Sleep(lookEvery)
		require.True(t, isHandedOff(servers[1].ask("report")), servers[1].Reason)
		servers[0].kill()
		servers[1].ask("accept")
		servers[2].ask("accept")
		require.Equal(t, n, answered(conns))

		require.NoError(t, os.Mkdir(dir, 0o700))
		soon(t, func() bool {
			entries, err := os.ReadDir(job.Path)
			return err == nil && len(entries) == 2
		}, "the directory isn't made again")
		servers = append(servers[1:], startServer(t, job))
		for _, s := range servers {
			s.becomes(isHandedOff)
		}
		for _, c := range conns {
			c.Close()
		}
		more := standing(t, job.Address, n)
		servers[0].ask("close")
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
	for range races(count(20, 4), 6) {
		var others []*server
		first := rand.IntN(2) == 0
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

// Each start of a service removes the file of its unix socket first, as many do. Whoever
// is queued at any file is served, whichever process goes, and however.
func TestHandoffUnixSocketFilesOfAll(t *testing.T) {
	beside(t)
	if os.Geteuid() == 0 {
		t.Skip("root: TestUnprivileged runs it as another user")
	}
	noLeaks(t)
	for _, goes := range []string{"close", "kill"} {
		for _, first := range []bool{true, false} {
			path := handoffPath(t)
			app := filepath.Join(filepath.Dir(path), "app.sock")
			job := serverJob{Path: path, Network: "unix", Address: app, Members: 2}
			var servers []*server
			var conns []net.Conn
			for range 3 {
				os.Remove(app)
				servers = append(servers, startServer(t, job))
				for range 4 {
					c, err := dialOnce("unix", app)
					require.NoError(t, err)
					defer c.Close()
					_, err = c.Write([]byte("x"))
					require.NoError(t, err)
					conns = append(conns, c)
				}
			}
			for _, s := range servers {
				s.becomes(isHandedOff)
			}
			if !first {
				servers[0], servers[2] = servers[2], servers[0]
			}
			for _, s := range servers[:2] {
				if goes == "kill" {
					s.kill()
				} else {
					s.close()
				}
			}
			c, err := dialOnce("unix", app)
			require.NoError(t, err)
			defer c.Close()
			_, err = c.Write([]byte("x"))
			require.NoError(t, err)
			servers[2].ask("accept")
			conns = append(conns, c)
			require.Equal(t, len(conns), answered(conns), "%s, the first: %v", goes, first)
			for _, c := range conns {
				c.Close()
			}
			servers[2].close()
			require.NoFileExists(t, app)
		}
	}
}

// Several addresses, of several networks, use one path.
func TestHandoffSeveralAddresses(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	type addr struct{ network, address string }
	var addrs []addr
	var mine []*Listener
	for _, e := range endpoints[:3] {
		e.need(t)
		addrs = append(addrs, addr{e.network, e.listen})
	}
	addrs = append(addrs, addr{"unix", filepath.Join(filepath.Dir(path), "app.sock")})
	var jobs []serverJob
	for _, a := range addrs {
		_, ls := newTestGroup(t, 1, a.network, a.address, WithHandoff(path))
		mine = append(mine, ls[0])
		jobs = append(jobs, serverJob{Path: path, Network: a.network, Address: ls[0].Addr().String(), Members: 1})
	}
	for i, job := range jobs {
		s := startServer(t, job)
		s.becomes(isHandedOff)
		require.NotZero(t, mine[i].Info().OnKill&InheritHandoff)
		for range 2 {
			c := dialTest(t, mine[i].Addr())
			_, err := c.Write([]byte("x"))
			require.NoError(t, err)
			defer c.Close()
		}
		s.kill()
	}
	for i := range jobs {
		for range 2 {
			acceptWithin(t, mine[i])
		}
	}
	for _, l := range mine {
		require.NoError(t, l.Close())
	}
	require.NoFileExists(t, addrs[3].address)
}

// What a killed process leaves on an address without others is kept for a while, by
// those that listen elsewhere, and then closed.
func TestHandoffUnserved(t *testing.T) {
	if !alone(t) {
		return
	}
	noLeaks(t)
	defer set(&orphanLooks, 2)()
	path := handoffPath(t)
	elsewhere, err := Listen("tcp", "127.0.0.1:0", WithHandoff(path))
	require.NoError(t, err)
	defer elsewhere.Close()
	one := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0"})
	pool := func() (n int) {
		eachPooled(path, func(int) { n++ })
		return n
	}
	require.Equal(t, 1+4, pool())
	conns := standing(t, one.Address, 8)
	one.kill()
	require.Eventually(t, func() bool { return pool() == 1 }, limit(5*time.Second), 5*time.Millisecond)
	require.Zero(t, answered(conns))
}
