//go:build unix && !aix

package lblisten

// What keeps a handoff this user's: whether its path is in a directory that nobody
// else can write to, whether the files there are its own, the lock file, and whose
// process is at the other end of a connection. It changes nothing but to make the
// lock file, and doesn't know who takes the lock or what is said on a connection.

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// checkHandoffPath returns the absolute path of a handoff, or why it can't be
// one and what to do. It harms nothing.
func checkHandoffPath(path string) (string, error) {
	// The name is bound with a suffix first; see hub.begin.
	most := len(syscall.RawSockaddrUnix{}.Path) - 1 - len(newPath(""))
	if path == "" || strings.ContainsRune(path, 0) {
		return "", errors.New("the path is empty, or has a NUL in it")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(abs) > most {
		return "", fmt.Errorf("%s has %d bytes, and a unix socket here can have a path of %d: choose a shorter one", abs, len(abs), most)
	}
	dir := filepath.Dir(abs)
	st, err := os.Stat(dir)
	if err != nil {
		return "", fmt.Errorf("the directory of the path: %w", err)
	}
	uid := os.Geteuid()
	switch owner := uidOf(st); {
	case !st.IsDir():
		return "", fmt.Errorf("%s is not a directory", dir)
	case owner != uid && owner != 0:
		return "", fmt.Errorf("the directory %s belongs to uid %d: choose one of uid %d, which this process has, or root's", dir, owner, uid)
	case st.Mode()&0o022 != 0:
		return "", fmt.Errorf("the directory %s can be written to by others (mode %#o): choose one that only uid %d or root can write to, such as /run/NAME with mode 0755", dir, st.Mode().Perm(), uid)
	case !canCheckPeer && (owner != uid || st.Mode()&0o077 != 0):
		return "", fmt.Errorf("this system doesn't tell whose a process is, so the directory %s must have mode 0700 and belong to uid %d", dir, uid)
	}
	if err := checkSocketFile(abs); err != nil {
		return "", err
	}
	lock, err := openLock(abs)
	switch {
	case err == nil:
		lock.Close()
	case !isShortage(err):
		return "", fmt.Errorf("its lock file: %w", err)
	}
	return abs, nil
}

// checkSocketFile checks that what is at a path, if anything, is a socket of
// this user.
func checkSocketFile(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there already and is not a unix socket: choose another path", path)
	case uidOf(st) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, this process is uid %d: processes of one user can hand off to each other", path, uidOf(st), os.Geteuid())
	}
	return nil
}

// uidOf returns the owner of a file.
func uidOf(st fs.FileInfo) int {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// checkPeer checks that the process at the other end is this user's.
func checkPeer(c *net.UnixConn) error {
	if !canCheckPeer {
		return nil // the directory is this user's alone
	}
	conn, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var uid int
	if err := control(conn, func(fd uintptr) (err error) { uid, err = peerUID(int(fd)); return err }); err != nil {
		return err
	}
	if uid != os.Geteuid() {
		return fmt.Errorf("the process at the other end is of uid %d, this one of uid %d", uid, os.Geteuid())
	}
	return nil
}

// lockPath and newPath are the files beside the path of a handoff.
func lockPath(path string) string { return path + ".lock" }
func newPath(path string) string  { return path + ".new" }

// openLock opens the lock file and checks that it is this user's.
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(lockPath(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file", f.Name())
	case uidOf(st) != os.Geteuid():
		err = fmt.Errorf("%s belongs to uid %d, this process is uid %d", f.Name(), uidOf(st), os.Geteuid())
	case st.Size() > 0:
		if _, ours := readCount(f); !ours {
			err = fmt.Errorf("%s is there already and is not the lock file of a handoff: choose another path", f.Name())
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// lockText is what is in a lock file: how many processes the hub knew last.
// It is overwritten in place, so that it is whole at any time.
const lockText = "lblisten handoff, processes: %4d\n"

// readCount returns the number in a lock file, and whether it is one.
func readCount(f *os.File) (n int, ours bool) {
	b := make([]byte, 64)
	size, _ := f.ReadAt(b, 0)
	_, err := fmt.Sscanf(string(b[:size]), lockText, &n)
	return n, err == nil
}
