//go:build unix && !aix

package lblisten

// The directory of a handoff: what one has to be, and how a process is found in it.
// It is this user's alone, so whoever is in it needs no further check.

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// checkHandoffPath tells whether a path can be a handoff's: nil, or why not and what
// to do. It harms nothing.
func checkHandoffPath(path string) error {
	most := len(syscall.RawSockaddrUnix{}.Path) - 1 - len("/.") - len(id{}.String())
	switch {
	case path == "" || strings.ContainsRune(path, 0):
		return errors.New("the path is empty, or has a NUL in it: name a directory, such as /run/NAME/handoff")
	case path[0] == '@' || path[0] == '~':
		return fmt.Errorf("%q is no path of a directory (nobody expands it): name one from the root, such as /run/NAME/handoff", path)
	case !filepath.IsAbs(path):
		return fmt.Errorf("%q is relative, and processes have working directories of their own: name a directory from the root, such as /run/NAME/handoff", path)
	case len(path) > most:
		return fmt.Errorf("%s has %d bytes, and the directory of a handoff can have %d here: choose a shorter path", path, len(path), most)
	}
	return nil
}

// makeHandoffDir makes the directory, or accepts one of this user with mode 0700.
func makeHandoffDir(path string) error {
	if err := os.Mkdir(path, 0o700); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: make its parent (install -d -m 755 %s), or have systemd make it by RuntimeDirectory=", err, filepath.Dir(path))
	} else if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	sys, _ := st.Sys().(*syscall.Stat_t)
	instead := "name a directory that doesn't exist yet and it is made, such as " + filepath.Join(path, "lblisten")
	switch uid := os.Geteuid(); {
	case !st.IsDir():
		return fmt.Errorf("%s is not a directory, and a handoff needs one (mode %v): choose another path", path, st.Mode())
	case sys != nil && int(sys.Uid) != uid:
		return fmt.Errorf("%s belongs to uid %d and this process is uid %d, but a handoff is between processes of one user: run them as that user, or name another directory", path, sys.Uid, uid)
	case st.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %#o, and a handoff's directory is its user's alone (0700): %s", path, st.Mode().Perm(), instead)
	}
	return nil
}

// announce makes a socket of this process in the directory, which listens before it
// has its name.
func announce(path string, self id) (*net.UnixListener, error) {
	if err := makeHandoffDir(path); err != nil {
		return nil, err
	}
	name := filepath.Join(path, self.String())
	young := filepath.Join(path, "."+self.String())
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: young, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Rename(young, name); err != nil {
		ln.Close()
		os.Remove(young)
		return nil, err
	}
	return ln, nil
}

// processesIn returns the ids of the processes that are in the directory, and
// removes what was left of some that died before they had a name.
func processesIn(path string) (ids []id, err error) {
	const longer = time.Minute // than anybody takes between bind and rename
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name, young := strings.CutPrefix(e.Name(), ".")
		x, ok := parseID(name)
		if !ok || e.Type() != fs.ModeSocket {
			continue
		}
		if !young {
			ids = append(ids, x)
		} else if st, err := e.Info(); err == nil && time.Since(st.ModTime()) > longer {
			os.Remove(filepath.Join(path, e.Name()))
		}
	}
	return ids, nil
}

// isShortage tells whether an error is one of a shortage, which may pass, and not
// of a wrong path.
func isShortage(err error) bool {
	for _, e := range []syscall.Errno{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EIO, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
