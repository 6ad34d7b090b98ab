//go:build unix && !linux && !freebsd && !darwin && !aix

package lblisten

// Systems whose way to tell whose process is at the other end of a unix socket
// x/sys doesn't have. The directory of a handoff must be this user's alone there.

const canCheckPeer = false

func peerUID(fd int) (int, error) { return -1, ErrUnsupported }
