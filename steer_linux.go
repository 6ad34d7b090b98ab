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
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

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
