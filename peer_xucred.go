//go:build freebsd || darwin

package lblisten

// Whose process is at the other end of a unix socket, on FreeBSD and macOS. What
// follows from it is in handoff_dir_unix.go.

import (
	"os"

	"golang.org/x/sys/unix"
)

const canCheckPeer = true

func peerUID(fd int) (int, error) {
	const solLocal = 0 // SOL_LOCAL in sys/un.h
	cred, err := unix.GetsockoptXucred(fd, solLocal, unix.LOCAL_PEERCRED)
	if err != nil {
		return -1, os.NewSyscallError("getsockopt LOCAL_PEERCRED", err)
	}
	return int(cred.Uid), nil
}
