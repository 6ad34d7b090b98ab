package lblisten

// The parser of what the kernel says of who listens.

import (
	"encoding/binary"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// diagMessage is a message of sock_diag about a socket.
func diagMessage(kind uint16, port uint16, src net.IP, inode uint32) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN+72)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	m := b[unix.NLMSG_HDRLEN:]
	binary.BigEndian.PutUint16(m[4:], port)
	copy(m[8:24], src)
	binary.NativeEndian.PutUint32(m[68:], inode)
	return b
}

// FuzzDiag feeds the parser of what the kernel says of who listens: it takes no
// message for more than it is, whatever its length says, and finds what is put
// behind whole messages.
func FuzzDiag(f *testing.F) {
	four, six := net.IPv4(127, 0, 0, 1).To4(), net.ParseIP("::1")
	all := append(diagMessage(unix.SOCK_DIAG_BY_FAMILY, 80, four, 7), diagMessage(unix.SOCK_DIAG_BY_FAMILY, 80, six, 8)...)
	f.Add(all, false)
	f.Add(all, true)
	f.Add(all[:100], false)
	f.Add(diagMessage(unix.NLMSG_DONE, 0, nil, 0), false)
	f.Add(diagMessage(unix.NLMSG_ERROR, 0, nil, 0), false)
	f.Add([]byte{16, 0, 0, 0, unix.NLMSG_ERROR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, false) // no errno in it
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, v6 bool) {
		at, ip := place{network: "tcp4", host: "127.0.0.1", port: 80}, four
		if v6 {
			at, ip = place{network: "tcp6", host: "::1", port: 80}, six
		}
		inodes, done, err := parseDiag(b, at)
		if err != nil || done {
			return
		}
		require.LessOrEqual(t, len(inodes), len(b)/(unix.NLMSG_HDRLEN+72))
		if len(b)%4 != 0 || len(b) > 0 && lastDiag(b) < 0 {
			return // the last one has no end
		}
		more, _, err := parseDiag(append(b[:len(b):len(b)], diagMessage(unix.SOCK_DIAG_BY_FAMILY, 80, ip, 99)...), at)
		require.NoError(t, err)
		require.Equal(t, append(inodes, 99), more)
	})
}

// lastDiag returns where the last whole message of b begins, if it ends with b,
// else -1.
func lastDiag(b []byte) int {
	for at := 0; at+unix.NLMSG_HDRLEN <= len(b); {
		length := (int(binary.NativeEndian.Uint32(b[at:])) + 3) &^ 3
		if at+length == len(b) {
			return at
		}
		at += length
	}
	return -1
}
