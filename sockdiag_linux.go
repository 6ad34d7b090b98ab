package lblisten

// Who else listens on an address: sock_diag(7). It knows nothing of steering.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// migrateSysctl makes the kernel migrate without a program, from Linux 5.14, for
// IPv6 as well. It belongs to a network namespace.
const migrateSysctl = "net.ipv4.tcp_migrate_req"

// A netspace is a network namespace in which this process has balanced sockets. What
// is asked of the kernel about them is asked there, whichever thread asks.
type netspace struct {
	cookie uint64
	users  int // addresses; guarded by spaces.mu
	diag   int // a socket of sock_diag, -1 for none
	err    error
	sysctl int           // the file of migrateSysctl, -1 for none
	counts int           // the file of what the kernel has counted, -1 for none
	column int           // where in it the migrations are, -1 if they aren't
	before atomic.Uint64 // how many there had been at the last look
	busy   chan struct{} // holds one: whoever asks over diag
}

var spaces = struct {
	mu sync.Mutex // guards what follows, for instants; a leaf
	m  map[uint64]*netspace
	// lingering are sockets of ended addresses, or of such that go on, by inode, that
	// were closed here and still listen: a child between fork and exec, or a File, has
	// them. They are nobody else's.
	lingering map[uint32]place
}{m: make(map[uint64]*netspace), lingering: make(map[uint32]place)}

// enterSpace returns the network namespace of the calling thread, whose cookie is
// given.
func enterSpace(cookie uint64) *netspace {
	spaces.mu.Lock()
	defer spaces.mu.Unlock()
	n := spaces.m[cookie]
	if n == nil {
		n = &netspace{cookie: cookie, busy: make(chan struct{}, 1)}
		n.diag, n.err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		n.err = os.NewSyscallError("socket NETLINK_SOCK_DIAG", n.err)
		if n.err == nil {
			unix.SetsockoptTimeval(n.diag, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
		}
		n.sysctl = openProc("/proc/sys/" + strings.ReplaceAll(migrateSysctl, ".", "/"))
		n.counts = openProc("/proc/thread-self/net/netstat")
		n.column = slices.Index(strings.Fields(n.readCounts(0)), "TCPMigrateReqSuccess")
		n.before.Store(n.migrations())
		spaces.m[cookie] = n
	}
	n.users++
	return n
}

// hold keeps what n has open until leave. It fails if that is closed: the address that
// asks has ended meanwhile.
func (n *netspace) hold() error {
	spaces.mu.Lock()
	defer spaces.mu.Unlock()
	if n.users == 0 {
		return net.ErrClosed
	}
	n.users++
	return nil
}

// leave gives back what enterSpace returned, or hold.
func (n *netspace) leave() {
	spaces.mu.Lock()
	defer spaces.mu.Unlock()
	if n.users--; n.users > 0 {
		return
	}
	delete(spaces.m, n.cookie)
	for _, fd := range []int{n.diag, n.sysctl, n.counts} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// openProc opens a file that the kernel makes up, of the namespace of this thread; -1
// if it isn't there.
func openProc(path string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return fd
}

// readCounts returns a line of what the kernel has counted about TCP: 0 is the names, 1
// the numbers.
func (n *netspace) readCounts(line int) string {
	b := make([]byte, 1<<14)
	size, err := unix.Pread(n.counts, b, 0)
	if err != nil {
		return ""
	}
	lines := strings.Split(string(b[:size]), "\n")
	return lines[min(line, len(lines)-1)]
}

// canMigrate tells whether the kernel may migrate connections: it counts them, from
// Linux 5.14 on, or doesn't let itself be asked.
func (n *netspace) canMigrate() bool { return n.column >= 0 || n.counts < 0 }

// hasMigrated tells whether the kernel has migrated a connection since it was asked
// last, or may have.
func (n *netspace) hasMigrated() bool {
	if n.counts < 0 {
		return true
	}
	if n.hold() != nil {
		return false
	}
	defer n.leave()
	now := n.migrations()
	return n.before.Swap(now) != now
}

// migrations returns how many connections the kernel has migrated.
func (n *netspace) migrations() uint64 {
	numbers := strings.Fields(n.readCounts(1))
	if n.column < 0 || n.column >= len(numbers) {
		return 0
	}
	count, _ := strconv.ParseUint(numbers[n.column], 10, 64)
	return count
}

// migrates tells whether the kernel migrates without a program. The sysctl alone doesn't
// say so: Debian's 5.10 has it, counts no migration and does none.
func (n *netspace) migrates() bool {
	var b [1]byte
	if n.sysctl < 0 || n.column < 0 || n.hold() != nil {
		return false
	}
	defer n.leave()
	_, err := unix.Pread(n.sysctl, b[:], 0)
	return err == nil && b[0] == '1'
}

// lingerIfListed remembers those of some sockets, which have been closed, that still
// listen.
func (n *netspace) lingerIfListed(at place, inodes []uint32) {
	if len(inodes) == 0 {
		return
	}
	there, _ := n.listeningOn(at)
	spaces.mu.Lock()
	defer spaces.mu.Unlock()
	for _, ino := range inodes {
		if there[ino] {
			spaces.lingering[ino] = at
		}
	}
}

// strangers counts the listening sockets of the address that aren't this process's.
func (k *kernelSteering) strangers() (int, error) {
	k.a.mu.Lock() // a member that closes is in one of two lists
	own := slices.Clone(k.opened)
	for _, l := range *k.a.members.Load() {
		own = append(own, l.role.(*owner).s)
	}
	for _, w := range *k.a.shared.Load() {
		own = append(own, w.s)
	}
	k.a.mu.Unlock()
	return k.strangersBut(own)
}

// strangersBut is strangers, of an address that has these sockets.
func (k *kernelSteering) strangersBut(own []*socket) (int, error) {
	there, err := k.space.listeningOn(k.a.at)
	if err != nil {
		return 0, err
	}
	for _, ino := range inodesOf(own) {
		delete(there, ino)
	}
	spaces.mu.Lock()
	defer spaces.mu.Unlock()
	for ino, at := range spaces.lingering {
		switch {
		case at != k.a.at:
		case there[ino]:
			delete(there, ino)
		default:
			delete(spaces.lingering, ino)
		}
	}
	return len(there), nil
}

// inodesOf returns the inodes of sockets, by which sock_diag tells them.
func inodesOf(socks []*socket) (inodes []uint32) {
	for _, s := range socks {
		onSocket(s, func(fd int) error {
			var st unix.Stat_t
			err := unix.Fstat(fd, &st)
			if err == nil {
				inodes = append(inodes, uint32(st.Ino))
			}
			return err
		})
	}
	return inodes
}

// listeningOn returns the inodes of the listening sockets that are bound to a place.
func (n *netspace) listeningOn(at place) (map[uint32]bool, error) {
	if n.err != nil {
		return nil, n.err
	}
	if err := n.hold(); err != nil {
		return nil, err
	}
	defer n.leave()
	n.busy <- struct{}{}
	defer func() { <-n.busy }()
	if err := unix.Sendto(n.diag, diagRequest(at), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto NETLINK_SOCK_DIAG", err)
	}
	inodes := make(map[uint32]bool)
	buf := make([]byte, 1<<15)
	for {
		size, _, err := unix.Recvfrom(n.diag, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvfrom NETLINK_SOCK_DIAG", err)
		}
		some, done, err := parseDiag(buf[:size], at)
		if err != nil {
			return nil, err
		}
		for _, ino := range some {
			inodes[ino] = true
		}
		if done {
			return inodes, nil
		}
	}
}

// diagRequest asks for the listening sockets on a port.
func diagRequest(at place) []byte {
	const (
		length = unix.NLMSG_HDRLEN + 56 // struct inet_diag_req_v2
		listen = 10                     // TCP_LISTEN
	)
	req := make([]byte, length)
	binary.NativeEndian.PutUint32(req[0:], length)
	binary.NativeEndian.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16], req[17] = unix.AF_INET, unix.IPPROTO_TCP
	if at.network != "tcp4" {
		req[16] = unix.AF_INET6
	}
	binary.NativeEndian.PutUint32(req[20:], 1<<listen)
	binary.BigEndian.PutUint16(req[24:], uint16(at.port))
	return req
}

// parseDiag returns the inodes of the sockets that are bound to a place, of all that a
// datagram of sock_diag tells of, and whether it was the last one.
func parseDiag(b []byte, at place) (inodes []uint32, done bool, err error) {
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
		if ino, is := diagInode(m, at); is {
			inodes = append(inodes, ino)
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return inodes, false, nil
}

// diagInode returns the inode of a socket that a message tells of, if it is one of the
// kernel's group of a place: of the same address, device, and IPV6_V6ONLY where that
// makes a difference (inet_reuseport_add_sock in net/ipv4/inet_hashtables.c).
func diagInode(m []byte, at place) (inode uint32, is bool) {
	const diagLen = 72 // struct inet_diag_msg
	if len(m) < diagLen || binary.BigEndian.Uint16(m[4:]) != uint16(at.port) || binary.NativeEndian.Uint32(m[40:]) != uint32(at.device) {
		return 0, false
	}
	host, _, _ := strings.Cut(at.host, "%")
	want, _ := netip.ParseAddr(host)
	src := netip.AddrFrom4([4]byte(m[8:12]))
	if at.network != "tcp4" {
		src = netip.AddrFrom16([16]byte(m[8:24]))
	}
	if src.Unmap() != want.Unmap() || at.network != "tcp4" && want.IsUnspecified() && isDiagOnly(m[diagLen:]) == (at.network == "tcp") {
		return 0, false
	}
	return binary.NativeEndian.Uint32(m[68:]), true
}

// isDiagOnly tells whether the attributes of a socket say IPV6_V6ONLY.
func isDiagOnly(attrs []byte) bool {
	const skV6Only = 11 // INET_DIAG_SKV6ONLY
	for len(attrs) >= unix.NLA_HDRLEN {
		length := int(binary.NativeEndian.Uint16(attrs))
		if length < unix.NLA_HDRLEN || length > len(attrs) {
			return false
		}
		if binary.NativeEndian.Uint16(attrs[2:]) == skV6Only && length > unix.NLA_HDRLEN {
			return attrs[unix.NLA_HDRLEN] != 0
		}
		attrs = attrs[min(len(attrs), (length+3)&^3):]
	}
	return false
}
