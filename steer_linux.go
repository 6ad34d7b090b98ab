package lblisten

// Steering between the kernel's sockets on Linux, by CPU without a program, else
// by a program that names sockets. Which program is in bpf_linux.go; here is when
// it is in force: only while every socket of the kernel's group is one of this
// process, because it would starve the others.
//
// With CAP_BPF the program looks the socket up in a table, which user space
// fills by rendezvous hashing, and migrates too. Without, it is a classic one
// that names sockets by their place in the kernel's group, of which a mirror is
// kept: a socket is appended by listen(2), and close(2) moves the last one into
// the hole (net/core/sock_reuseport.c).

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	cbpf "golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// retireAfter is how long a closed member's socket must have been quiet, while
// nothing was steered to it, before it is closed.
const retireAfter = 3 * time.Second

// kernelSteering is the steering of one group. Its fields are guarded by
// group.mu, but for what says otherwise.
type kernelSteering struct {
	g     *group
	table *steerTable // nil without CAP_BPF
	since time.Time   // when a program came into force; zero while none is
	why   error       // why none is, although it should be
	tried bool        // to get a table, by flow
	moved bool        // a stranger was in the kernel's group: the mirror is worth nothing

	retiring sync.Mutex // held while a socket is retired; comes before group.mu
	mirror   struct {
		sync.Mutex // held over bind, listen and close of the group's sockets
		order      []*socket
	}
	sampler sampler
}

// kernelSteers tells whether this kernel can steer so at all: nil, or why not.
func kernelSteers(s Steering) error {
	if s == SteerCPU && !atLeastLinux(6, 2) {
		return errors.New("SO_INCOMING_CPU steers from Linux 6.2 on")
	}
	return nil
}

func atLeastLinux(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var ma, mi int
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &ma, &mi)
	return ma > major || ma == major && mi >= minor
}

// setCPU gives a new socket the CPU that fewest sockets of the group have.
func (k *kernelSteering) setCPU(fd uintptr) error {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return os.NewSyscallError("sched_getaffinity", err)
	}
	users := make(map[int]int)
	for _, s := range k.mirror.order {
		s.conn.Control(func(fd uintptr) {
			if cpu, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_INCOMING_CPU); err == nil {
				users[cpu]++
			}
		})
	}
	best := -1
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) && (best < 0 || users[cpu] < users[best]) {
			best = cpu
		}
	}
	return os.NewSyscallError("setsockopt SO_INCOMING_CPU", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_INCOMING_CPU, best))
}

// steer puts the program in force that fits the members as they are now, or none
// if it may not be. It is called under group.mu after every join and leave, and
// once a second.
func (k *kernelSteering) steer() {
	g := k.g
	var owned, surplus []*socket
	for _, l := range *g.members.Load() {
		owned = append(owned, l.socks...)
	}
	for _, w := range *g.shared.Load() {
		surplus = append(surplus, w.s)
	}
	byProgram := g.steering == SteerSource || g.steering == SteerLoad
	if len(owned) == 0 || !byProgram && (len(surplus) == 0 || g.steering == SteerCPU) {
		k.letGo(nil)
		return
	}
	k.mirror.Lock()
	defer k.mirror.Unlock()
	strangers, err := k.strangers()
	switch {
	case err != nil:
		k.letGo(fmt.Errorf("who else is in the kernel's group is not to be found out: %w", err))
	case strangers > 0:
		k.moved = true
		k.letGo(fmt.Errorf("steering by %v would starve others: %d of the sockets in the kernel's group are not this process's", g.steering, strangers))
	default:
		if err := k.attach(owned); err != nil {
			k.letGo(err)
			return
		}
		k.why = nil
		if k.since.IsZero() {
			k.since = time.Now()
		}
	}
}

// letGo takes the program out of force, in favour of the migrating one if the
// group has that.
func (k *kernelSteering) letGo(why error) {
	k.why = why
	if k.since.IsZero() {
		return
	}
	k.since = time.Time{}
	members := *k.g.members.Load()
	if len(members) == 0 {
		return
	}
	members[0].socks[0].conn.Control(func(fd uintptr) {
		if k.g.undo == nil || reattachMigration(int(fd)) != nil {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
		}
	})
}

// replaced notes that a pinned program took the place of ours. It is called under
// group.mu.
func (k *kernelSteering) replaced() { k.since, k.why = time.Time{}, nil }

// attach makes new connections go to the owned sockets. It is called under
// mirror.
func (k *kernelSteering) attach(owned []*socket) error {
	if k.table != nil {
		if err := k.table.fill(owned); err != nil {
			return err
		}
		if !k.since.IsZero() {
			return nil // it is in force and reads the table
		}
		return onSocket(owned[0], func(fd int) error { return attachProgram(fd, k.table.program) })
	}
	switch {
	case k.g.steering == SteerLoad:
		return fmt.Errorf("steering by load takes a program with maps: %w; give the process CAP_BPF", ErrUnsupported)
	case k.moved:
		return errors.New("others were in the kernel's group, so the order of its sockets is not known any more; with CAP_BPF it would not matter")
	}
	return k.attachClassic(owned)
}

// attachClassic attaches a program that chooses between some of the sockets. It
// is called under mirror.
func (k *kernelSteering) attachClassic(some []*socket) error {
	var live []int
	for i, s := range k.mirror.order {
		if slices.Contains(some, s) {
			live = append(live, i)
		}
	}
	program, err := cbpf.Assemble(classicProgram(k.g.steering, live))
	if err != nil {
		return fmt.Errorf("assembling a program for %d sockets: %w", len(live), err)
	}
	code := make([]unix.SockFilter, len(program))
	for i, in := range program {
		code[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	return onSocket(some[0], func(fd int) error {
		return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_CBPF", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET,
			unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}))
	})
}

func onSocket(s *socket, f func(fd int) error) error {
	var err error
	if cerr := s.conn.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// retire closes sockets of closed members that nothing is steered to any more,
// when they have been quiet for long enough. It is called once a second, without
// a lock.
func (k *kernelSteering) retire() {
	for k.retireOne() {
		log(k.g.log, "the socket of a closed member is quiet and was closed", "address", k.g.addr)
		k.g.mu.Lock()
		k.steer()
		k.g.mu.Unlock()
	}
}

func (k *kernelSteering) retireOne() bool {
	k.retiring.Lock()
	defer k.retiring.Unlock()
	w := k.takeQuiet()
	if w == nil {
		return false
	}
	w.stop()
	k.discard(w.s)
	return true
}

// discard closes a socket that is not shared any more.
func (k *kernelSteering) discard(s *socket) {
	k.mirror.Lock()
	defer k.mirror.Unlock()
	s.ln.Close()
	k.removed(s)
}

// takeQuiet takes a socket out of the group that can be closed without anything
// being steered to it, before or after: with the table that is any; with a
// classic program the last place goes, and what is there moves into the hole.
func (k *kernelSteering) takeQuiet() *watch {
	g := k.g
	g.mu.Lock()
	defer g.mu.Unlock()
	if k.since.IsZero() || g.dying || time.Since(k.since) < retireAfter {
		return nil
	}
	k.mirror.Lock()
	defer k.mirror.Unlock()
	last := k.mirror.order[len(k.mirror.order)-1]
	var quiet []*watch
	for _, w := range *g.shared.Load() {
		if !w.ready.Load() && !w.readable() && time.Since(began)-time.Duration(w.used.Load()) >= retireAfter {
			quiet = append(quiet, w)
		}
	}
	if len(quiet) == 0 {
		return nil
	}
	w := quiet[0]
	if i := slices.IndexFunc(quiet, func(w *watch) bool { return w.s == last }); i >= 0 {
		w = quiet[i] // no other socket moves
	} else if k.table == nil {
		var others []*socket
		for _, l := range *g.members.Load() {
			for _, s := range l.socks {
				if s != last {
					others = append(others, s)
				}
			}
		}
		if len(others) == 0 || len(*g.shared.Load()) > 1 && slices.ContainsFunc(*g.shared.Load(), func(w *watch) bool { return w.s == last }) {
			// Nobody else can stand in while the only member, or a socket that isn't
			// quiet yet, moves. Whatever strays to another socket in that instant
			// starts its quiet time anew.
			k.since = time.Now()
		} else if k.attachClassic(others) != nil {
			return nil
		}
	}
	rest := slices.DeleteFunc(slices.Clone(*g.shared.Load()), func(x *watch) bool { return x == w })
	g.shared.Store(&rest)
	return w
}

// removed follows what close(2) does to the order of the kernel's group. It is
// called under mirror.
func (k *kernelSteering) removed(s *socket) {
	order := k.mirror.order
	if i := slices.Index(order, s); i >= 0 {
		order[i] = order[len(order)-1]
		k.mirror.order = order[:len(order)-1]
	}
	if k.table != nil {
		k.table.drop(s)
	}
}

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

// A steerTable is what the steering program with maps looks up, and the program.
type steerTable struct {
	program int // descriptors
	array   int // of sockets, by slot
	state   int // of the state, mapped at mem
	mem     []byte
	slots   [tableSlots]*socket
}

// newSteerTable loads the program. It needs CAP_BPF.
func newSteerTable(s Steering) (*steerTable, error) {
	t := &steerTable{program: -1, array: -1, state: -1}
	var err error
	if t.array, err = createMap(unix.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 8, tableSlots, 0); err == nil {
		t.state, err = createMap(unix.BPF_MAP_TYPE_ARRAY, stateSize, 1, unix.BPF_F_MMAPABLE)
	}
	if err == nil {
		t.mem, err = unix.Mmap(t.state, 0, (stateSize+os.Getpagesize()-1)&^(os.Getpagesize()-1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err == nil {
		t.program, err = loadProgram(steerProgram(s, t.array, t.state))
	}
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *steerTable) close() {
	if t.mem != nil {
		unix.Munmap(t.mem)
	}
	for _, fd := range []int{t.program, t.array, t.state} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (t *steerTable) word(offset int) *uint32 { return (*uint32)(unsafe.Pointer(&t.mem[offset])) }

// fill makes the program choose between sockets: it gives each a slot, ranks
// them for every bucket of the hash in the table that is not in use, and then
// has the program use that one.
func (t *steerTable) fill(socks []*socket) error {
	if len(socks) > tableSlots {
		return fmt.Errorf("steering is for at most %d sockets: %w", tableSlots, ErrUnsupported)
	}
	slots := make([]int, len(socks))
	for i, s := range socks {
		slots[i] = slices.Index(t.slots[:], s)
		if slots[i] >= 0 {
			continue
		}
		slots[i] = slices.Index(t.slots[:], nil)
		if slots[i] < 0 {
			return fmt.Errorf("steering is for at most %d sockets: %w", tableSlots, ErrUnsupported)
		}
		if err := onSocket(s, func(fd int) error { return updateMap(t.array, uint32(slots[i]), uint64(fd)) }); err != nil {
			return fmt.Errorf("putting a socket into the program's table: %w", err)
		}
		t.slots[slots[i]] = s
		s.slot.Store(int32(slots[i]) + 1)
	}
	table := 1 - int(atomic.LoadUint32(t.word(stateTable)))
	id := func(i int) uint64 { return uint64(slots[i]) + 1 }
	for bucket := range tableBuckets {
		key := weight(uint64(bucket), 0x5bd1e995)
		first := firstInRank(key, len(slots), id, func(int) bool { return true })
		second := firstInRank(key, len(slots), id, func(i int) bool { return i != first })
		if second < 0 {
			second = first
		}
		at := stateTables + table*tableSize + 4*bucket
		atomic.StoreUint32(t.word(at), uint32(slots[first]))
		atomic.StoreUint32(t.word(at+tableSize/2), uint32(slots[second]))
	}
	atomic.StoreUint32(t.word(stateTable), uint32(table))
	return nil
}

// drop frees the slot of a socket that is closed; the kernel has emptied it.
func (t *steerTable) drop(s *socket) {
	if i := slices.Index(t.slots[:], s); i >= 0 {
		t.slots[i] = nil
	}
}

// A sampler writes the lengths of the queues where the program reads them, while
// there is traffic.
type sampler struct {
	asleep  atomic.Bool
	wake    chan struct{}
	quit    chan struct{}
	ended   chan struct{}
	started bool // guarded by group.mu
}

const (
	sampleEvery = time.Millisecond
	sampleFor   = 100 * time.Millisecond // without traffic
)

// start starts the sampler, for SteerLoad. It is called under group.mu.
func (k *kernelSteering) start() {
	s := &k.sampler
	if s.started || k.table == nil {
		return
	}
	s.started = true
	s.wake, s.quit, s.ended = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go k.sample()
}

func (k *kernelSteering) sample() {
	s := &k.sampler
	defer close(s.ended)
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	busy := time.Now()
	var last uint64
	for {
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
		accepted, waiting := uint64(0), false
		for _, l := range *k.g.members.Load() {
			accepted += l.accepted.Load()
			for _, sock := range l.socks {
				queued, _ := queueLengths([]syscall.RawConn{sock.conn})
				if queued < 0 {
					continue
				}
				waiting = waiting || queued > 0
				if slot := sock.slot.Load(); slot > 0 {
					atomic.StoreUint32(k.table.word(stateLoads+4*int(slot-1)), uint32(queued))
				}
			}
		}
		if accepted != last || waiting {
			last, busy = accepted, time.Now()
			continue
		}
		if time.Since(busy) < sampleFor {
			continue
		}
		// No traffic: sleep until an Accept has returned a connection.
		s.asleep.Store(true)
		select {
		case <-s.quit:
			return
		case <-s.wake:
		}
		busy = time.Now()
	}
}

// awake is called after an Accept returned a connection.
func (s *sampler) awake() {
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		s.wake <- struct{}{}
	}
}

// newKernelSteering prepares the steering of a group that has no socket yet. It
// fails if it can't be had.
func newKernelSteering(g *group, cfg *config) (*kernelSteering, error) {
	k := &kernelSteering{g: g}
	if g.steering != SteerSource && g.steering != SteerLoad {
		return k, nil
	}
	if cfg.pinnedSet {
		return nil, fmt.Errorf("steering by %v is %w together with WithPinnedProgram: the address has one program", g.steering, ErrUnsupported)
	}
	if !g.at.isNew() {
		host, _, _ := strings.Cut(g.at.host, "%")
		there, err := listeningOn(&net.TCPAddr{IP: net.ParseIP(host), Port: g.at.port}, g.at.network != "tcp4")
		if err != nil {
			return nil, fmt.Errorf("steering by %v: who else listens is not to be found out: %w", g.steering, err)
		}
		if len(there) > 0 {
			return nil, fmt.Errorf("steering by %v is %w on an address on which others listen: they would get nothing", g.steering, ErrUnsupported)
		}
	}
	var err error
	if k.table, err = newSteerTable(g.steering); err != nil && g.steering == SteerLoad {
		return nil, fmt.Errorf("steering by load is %w here: loading its program: %w; give the process CAP_BPF, or use WithDispatcher", ErrUnsupported, err)
	}
	return k, nil
}

// control is called between socket(2) and bind(2) of a new socket. It holds the
// mirror, until opened.
func (k *kernelSteering) control(fd uintptr) error {
	k.mirror.Lock()
	if k.g.steering == SteerCPU {
		return k.setCPU(fd)
	}
	return nil
}

// opened is called after listen(2), with nil if that failed.
func (k *kernelSteering) opened(s *socket) {
	if s != nil {
		k.mirror.order = append(k.mirror.order, s)
	}
	k.mirror.Unlock()
}

// changed is called under group.mu when members have come or gone. By flow there
// is nothing to do at once: what closed members leave is often adopted soon.
func (k *kernelSteering) changed() {
	if k.g.steering == SteerSource || k.g.steering == SteerLoad {
		k.steer()
	}
	if k.g.steering == SteerLoad {
		k.start()
	}
}

// tick is called once a second, without a lock.
func (k *kernelSteering) tick() {
	g := k.g
	g.mu.Lock()
	if g.dying || g.pinned || g.h != nil { // other processes hold the sockets too
		g.mu.Unlock()
		return
	}
	if g.steering == SteerFlow && k.table == nil && !k.tried && len(*g.shared.Load()) > 0 {
		k.tried = true
		k.table, _ = newSteerTable(SteerFlow) // without it, a classic program
	}
	k.steer()
	g.mu.Unlock()
	k.retire()
}

// onAccept is what a member's Accept calls when it returns a connection; nil for
// nothing.
func (k *kernelSteering) onAccept() func(*net.TCPConn) {
	if k.g.steering == SteerLoad {
		return func(*net.TCPConn) { k.sampler.awake() }
	}
	return nil
}

// inForce returns the steering that is in force, why it isn't what was asked
// for, and why the kernel doesn't inherit because of it. It is called under
// group.mu.
func (k *kernelSteering) inForce() (s Steering, why, wont error) {
	if !k.since.IsZero() && k.table == nil {
		wont = errors.New("a classic program steers, in the place of the one that lets the kernel inherit; give the process CAP_BPF for both, or set " + migrateSysctl + "=1")
	}
	if k.why != nil && (k.g.steering == SteerSource || k.g.steering == SteerLoad) {
		return SteerFlow, k.why, wont
	}
	return k.g.steering, nil, wont
}

// close ends everything, when the sockets are closed. One that is retired at this
// moment isn't in the group any more.
func (k *kernelSteering) close() {
	k.retiring.Lock()
	defer k.retiring.Unlock()
	k.g.mu.Lock()
	started := k.sampler.started
	k.g.mu.Unlock()
	if started {
		close(k.sampler.quit)
		<-k.sampler.ended
	}
	if k.table != nil {
		k.table.close()
	}
}
