//go:build unix

package lblisten

// The file of a unix socket: removed, renamed, another's.

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inUnixModes runs a test with and without a handoff.
func inUnixModes(t *testing.T, f func(t *testing.T, listen func(path string) (*Listener, error))) {
	for _, handoff := range []bool{false, true} {
		t.Run(map[bool]string{false: "alone", true: "with a handoff"}[handoff], func(t *testing.T) {
			opt := WithLB()
			if handoff {
				if !handsOff() {
					t.Skip("no handoff on this system")
				}
				opt = WithHandoff(handoffPath(t))
			}
			noLeaks(t)
			f(t, func(path string) (*Listener, error) {
				l, err := Listen("unix", path, opt)
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { l.Close() })
				return l.(*Listener), nil
			})
		})
	}
}

// A program removes the file, or has it put out of the way, before it listens anew: the
// new file is there, clients of both are answered, and which listener closes first
// doesn't matter.
func TestUnixSocketIsBoundAnew(t *testing.T) {
	for _, how := range []string{"remove", "rename"} {
		for _, closes := range []string{"older", "newer"} {
			t.Run(how+", the "+closes+" one closes first", func(t *testing.T) {
				inUnixModes(t, func(t *testing.T, listen func(path string) (*Listener, error)) {
					path := socketPath(t)
					older, err := listen(path)
					require.NoError(t, err)
					clients := queueUp(t, older.Addr(), 5)
					conns := []net.Conn{acceptWithin(t, older)}
					if how == "remove" {
						require.NoError(t, os.Remove(path))
					} else {
						require.NoError(t, os.Rename(path, path+".old"))
					}
					newer, err := listen(path)
					require.NoError(t, err)
					more := queueUp(t, newer.Addr(), 5)
					first, left := older, newer
					if closes == "newer" {
						first, left = newer, older
					}
					require.NoError(t, first.Close())
					if how == "rename" {
						c, err := dialOnce("unix", path+".old")
						require.NoError(t, err)
						defer c.Close()
						_, err = c.Write([]byte("9\n"))
						require.NoError(t, err)
					}
					for len(conns) < map[string]int{"remove": 10, "rename": 11}[how] {
						conns = append(conns, acceptWithin(t, left))
					}
					for _, c := range conns {
						answer(t, c)
					}
					for i, c := range append(clients, more...) {
						wantAnswer(t, c, i%5)
					}
					c, err := dialOnce("unix", path)
					require.NoError(t, err, "the new file is there")
					require.NoError(t, c.Close())
					require.NoError(t, left.Close())
					_, err = os.Lstat(path)
					require.ErrorIs(t, err, os.ErrNotExist)
					if how == "rename" {
						require.NoError(t, os.Remove(path+".old"))
					}
				})
			})
		}
	}
}

// Accepts that wait in the older socket when a new one is bound get what comes by both.
func TestWaitingAcceptGetsFromTheNewFile(t *testing.T) {
	inUnixModes(t, func(t *testing.T, listen func(path string) (*Listener, error)) {
		path := socketPath(t)
		l, err := listen(path)
		require.NoError(t, err)
		for range 20 {
			waits := blocked(t, l)
			require.NoError(t, os.Remove(path))
			_, err := listen(path)
			require.NoError(t, err)
			dialTest(t, l.Addr())
			require.NoError(t, get(t, waits).err)
		}
	})
}

// Another program's file at the path is EADDRINUSE, as in package net, and stays when
// the listener that had the path before closes.
func TestUnixSocketOfAnother(t *testing.T) {
	inUnixModes(t, func(t *testing.T, listen func(path string) (*Listener, error)) {
		path := socketPath(t)
		l, err := listen(path)
		require.NoError(t, err)
		require.NoError(t, os.Remove(path))
		other, err := net.Listen("unix", path)
		require.NoError(t, err)
		defer other.Close()
		_, err = listen(path)
		require.ErrorIs(t, err, unix.EADDRINUSE)
		require.NoError(t, l.Close())
		c, err := dialOnce("unix", path)
		require.NoError(t, err, "the other one's file is gone")
		require.NoError(t, c.Close())
	})
}

// A service that removes its file and listens anew again and again has a few sockets,
// not one for each time.
func TestUnixSocketsThatNobodyReachesAreLetGo(t *testing.T) {
	beside(t)
	path := socketPath(t)
	most := 0
	var l net.Listener
	for begin := time.Now(); time.Since(begin) < limit(3*time.Second); time.Sleep(50 * time.Millisecond) {
		if err := os.Remove(path); err != nil {
			require.ErrorIs(t, err, os.ErrNotExist)
		}
		next, err := Listen("unix", path, WithLB())
		require.NoError(t, err)
		if l != nil {
			require.NoError(t, l.Close())
		}
		l = next
		most = max(most, l.(*Listener).Info().Sockets)
	}
	time.Sleep(limit(1100 * time.Millisecond)) // they are quiet for a second
	next, err := Listen("unix", path, WithLB())
	require.NoError(t, err)
	require.NoError(t, l.Close())
	require.LessOrEqual(t, next.(*Listener).Info().Sockets, 2)
	require.LessOrEqual(t, most, 30)
	require.NoError(t, next.Close())
}

// With a handoff a socket that is let go isn't in the pool any more, so its descriptors
// go with it.
func TestUnixSocketLetGoLeavesThePool(t *testing.T) {
	if !handsOff() {
		t.Skip("no handoff on this system")
	}
	noLeaks(t)
	path, opt := socketPath(t), WithHandoff(handoffPath(t))
	old, err := Listen("unix", path, opt)
	require.NoError(t, err)
	before := openDescriptors()
	for range 20 {
		require.NoError(t, os.Remove(path))
		l, err := Listen("unix", path, opt)
		require.NoError(t, err)
		require.NoError(t, old.Close())
		old = l
	}
	time.Sleep(limit(1100 * time.Millisecond)) // they are quiet for a second
	l, err := Listen("unix", path, opt)
	require.NoError(t, err)
	require.NoError(t, old.Close())
	require.Eventually(t, func() bool { return openDescriptors() <= before+4 }, limit(5*time.Second), time.Millisecond)
	require.NoError(t, l.Close())
}

// A path that can't be looked at any more: its directory is gone. That is a new file,
// and net's error.
func TestUnixSocketWithoutDirectory(t *testing.T) {
	inUnixModes(t, func(t *testing.T, listen func(path string) (*Listener, error)) {
		dir := filepath.Join(filepath.Dir(socketPath(t)), "d")
		require.NoError(t, os.Mkdir(dir, 0o700))
		l, err := listen(filepath.Join(dir, "s"))
		require.NoError(t, err)
		require.NoError(t, os.RemoveAll(dir))
		_, err = listen(filepath.Join(dir, "s"))
		require.ErrorIs(t, err, os.ErrNotExist)
		var op *net.OpError
		require.True(t, errors.As(err, &op))
		require.Equal(t, 1, l.Info().Members)
		require.NoError(t, l.Close())
	})
}
