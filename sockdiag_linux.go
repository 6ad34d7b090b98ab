package lblisten

// Who else listens on an address: sock_diag(7).

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// strangers counts the listening sockets of the address that aren't this
// group's. It asks the kernel by sock_diag(7). It is called under mirror.
func (k *kernelSteering) strangers() (int, error) {
	own := make(map[uint32]bool)
	for _, s := range k.mirror.order {
		err := onSocket(s, func(fd int) error {
			var st unix.Stat_t
			err := unix.Fstat(fd, &st)
			own[uint32(st.Ino)] = true
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	inodes, err := listeningOn(k.g.addr.(*net.TCPAddr), k.g.at.network != "tcp4")
	n := 0
	for _, ino := range inodes {
		if !own[ino] {
			n++
		}
	}
	return n, err
}

// listeningOn returns the inodes of the listening sockets that are bound to an
// address, in this network namespace.
func listeningOn(a *net.TCPAddr, v6 bool) ([]uint32, error) {
	const (
		msgLen = 16 + 56 // struct nlmsghdr, struct inet_diag_req_v2
		listen = 10      // TCP_LISTEN
	)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, os.NewSyscallError("socket NETLINK_SOCK_DIAG", err)
	}
	defer unix.Close(fd)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	family := byte(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	req := make([]byte, msgLen)
	binary.NativeEndian.PutUint32(req[0:], msgLen)
	binary.NativeEndian.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16], req[17] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[20:], 1<<listen)
	binary.BigEndian.PutUint16(req[24:], uint16(a.Port))
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto NETLINK_SOCK_DIAG", err)
	}
	var inodes []uint32
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvfrom NETLINK_SOCK_DIAG", err)
		}
		some, done, err := parseDiag(buf[:n], a, v6)
		if err != nil {
			return nil, err
		}
		inodes = append(inodes, some...)
		if done {
			return inodes, nil
		}
	}
}

// parseDiag returns the inodes of the sockets that are bound to an address, of
// all that a datagram of sock_diag tells of, and whether it was the last one.
func parseDiag(b []byte, a *net.TCPAddr, v6 bool) (inodes []uint32, done bool, err error) {
	const diagLen = 72 // struct inet_diag_msg
	want, _ := netip.AddrFromSlice(a.IP)
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return nil, false, errors.New("sock_diag: a message is cut off")
		}
		m := b[unix.NLMSG_HDRLEN:length]
		switch kind := binary.NativeEndian.Uint16(b[4:]); {
		case kind == unix.NLMSG_DONE:
			return inodes, true, nil
		case kind == unix.NLMSG_ERROR && len(m) < 4:
			return nil, false, errors.New("sock_diag: an error is cut off")
		case kind == unix.NLMSG_ERROR:
			return nil, false, fmt.Errorf("sock_diag: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(m))))
		}
		if len(m) >= diagLen && binary.BigEndian.Uint16(m[4:]) == uint16(a.Port) {
			var src netip.Addr
			if v6 {
				src = netip.AddrFrom16([16]byte(m[8:24]))
			} else {
				src = netip.AddrFrom4([4]byte(m[8:12]))
			}
			if src.Unmap() == want.Unmap() || src.IsUnspecified() && want.IsUnspecified() {
				inodes = append(inodes, binary.NativeEndian.Uint32(m[68:]))
			}
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return inodes, false, nil
}
