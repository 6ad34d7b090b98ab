package lblisten

// Whose process is at the other end of a unix socket, on Linux. What follows from
// it is in handoff_dir_unix.go.

import (
	"os"

	"golang.org/x/sys/unix"
)

const canCheckPeer = true

func peerUID(fd int) (int, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return -1, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	return int(cred.Uid), nil
}
