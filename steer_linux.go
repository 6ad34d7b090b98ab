package lblisten

// Steering between the kernel's sockets on Linux: which program is attached to the
// kernel's group of an address, and when. Programs are in bpf_linux.go, the table
// that one of them looks up in steertable_linux.go, who else listens in
// sockdiag_linux.go.
//
// There is one program for a group; whoever attaches last wins, nobody can ask what is
// attached, and it outlives its process while others are in the group. So as little as
// possible is attached. By flow and CPU it is the migrating program, once, after the
// first socket listens, if the process has CAP_BPF. By source and load it is one that
// names sockets, and only while every socket of the group is one of this process,
// because it would starve the others: with CAP_BPF one that looks them up in a table
// and migrates too, otherwise a classic one that chooses by source between all places of
// the group.
//
// A classic program is freed at once when it is replaced or detached, while packets may
// still run it, on kernels without 18fc650ccd7f of 2026 (CVE-2026-52910). So it is
// replaced only when the number of sockets has changed, which a member that closes
// doesn't: its socket keeps its place, and siblings serve it.

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// retireAfter is how long a closed member's socket must have been quiet, while
// nothing was steered to it, before it is closed.
const retireAfter = 3 * time.Second

// kernelSteering is the steering of one address. Its fields are the turn's, but for
// what is published.
type kernelSteering struct {
	a      *address
	space  *netspace
	has    program     // what this address has attached
	places int         // that a classic program chooses between
	table  *steerTable // nil without CAP_BPF, and by flow and CPU
	since  time.Time   // when the table came into force
	leaves []uint32    // inodes of the sockets that the end closes
	older  bool        // its group is older than the address: systemd has held sockets of it

	opened  []*socket // those that this process has opened and not closed; guarded by a.mu
	now     atomic.Pointer[inForce]
	sampler *sampler // nil but for SteerLoad
	stop    func()   // ends the once-a-second look
}

// A program is what is attached to the kernel's group, as far as this process knows.
type program int

const (
	noProgram program = iota // the kernel's hash
	migrating                // the kernel's hash, and the queue of a socket that closes goes to another
	byTable                  // the one that looks up sockets in a table, and migrates
	byPlace                  // the classic one that names places
	pinned                   // the one of WithPinnedProgram
	usersOwn                 // the user's Control attaches one, which is left alone
)

// inForce is what Info says, published when it changes.
type inForce struct {
	program     program
	notSteered  error // why SteerSource or SteerLoad isn't in force
	noMigration error // why no program migrates
}

// kernelSteers tells whether this kernel can steer so at all: nil, or why not.
func kernelSteers(s Steering) error {
	if s == SteerCPU && !atLeastLinux(6, 2) {
		return hint(ErrUnsupported, "SO_INCOMING_CPU steers from Linux 6.2 on")
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

// newKernelSteering prepares the steering of an address that has no socket yet. It
// fails if it can't be had.
func newKernelSteering(a *address, req *request, kept []*socket) (*kernelSteering, error) {
	k := &kernelSteering{a: a, space: enterSpace(a.at.space), opened: slices.Clone(kept), older: len(kept) > 0}
	k.publish(nil, nil)
	ready := false
	defer func() {
		if !ready {
			k.close()
		}
	}()
	if req.program {
		k.has = usersOwn
		k.publish(nil, errors.New("the program that Control attaches is left alone, so the one that lets the kernel inherit isn't attached"))
	}
	if a.steering.byProgram() {
		if req.pinned != nil {
			return nil, fmt.Errorf("steering by %v is %w together with WithPinnedProgram: the address has one program", a.steering, ErrUnsupported)
		}
		if !a.at.isNew() {
			switch others, err := k.strangers(); {
			case err != nil:
				return nil, fmt.Errorf("steering by %v: it can't be told who else listens: %w", a.steering, err)
			case others > 0:
				return nil, fmt.Errorf("steering by %v is %w on an address on which others listen: they would get nothing", a.steering, ErrUnsupported)
			}
		}
		var err error
		if k.table, err = newSteerTable(a.steering); err != nil && a.steering == SteerLoad {
			return nil, fmt.Errorf("steering by load is %w here: loading its program: %w; it takes CAP_BPF and Linux 5.14, or use WithDispatcher", ErrUnsupported, err)
		}
		k.publish(nil, noPrivilege(err))
		if k.older { // with its program goes its table, which has the sockets
			onSocket(kept[0], func(fd int) error { return detachProgram(uintptr(fd)) })
		}
	}
	if a.steering == SteerLoad {
		k.sampler = startSampler(a, k.table)
	}
	ready = true
	return k, nil
}

// noPrivilege says what a classic program means for inheritance.
func noPrivilege(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("a classic program steers, in the place of the one that lets the kernel inherit: %w; %s", err, whatMigrationTakes(err))
}

// publish says what is in force from now on.
func (k *kernelSteering) publish(notSteered, noMigration error) {
	k.now.Store(&inForce{k.has, notSteered, noMigration})
}

// control is called between socket(2) and bind(2) of a new socket.
func (k *kernelSteering) control(fd uintptr) error {
	if k.a.steering == SteerCPU {
		return k.setCPU(fd)
	}
	return nil
}

// setCPU gives a new socket the CPU that fewest sockets of the address have.
func (k *kernelSteering) setCPU(fd uintptr) error {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return os.NewSyscallError("sched_getaffinity", err)
	}
	users := make(map[int]int)
	for _, s := range k.open() {
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

// add is called for each new socket, after listen(2).
func (k *kernelSteering) add(s *socket) {
	k.a.mu.Lock()
	defer k.a.mu.Unlock()
	k.opened = append(k.opened, s)
}

// drop is called for each socket that was closed while the address goes on.
func (k *kernelSteering) drop(s *socket) {
	k.a.mu.Lock()
	defer k.a.mu.Unlock()
	k.opened = slices.DeleteFunc(k.opened, func(x *socket) bool { return x == s })
}

// open returns the sockets that this process has opened and not closed.
func (k *kernelSteering) open() []*socket {
	k.a.mu.Lock()
	defer k.a.mu.Unlock()
	return slices.Clone(k.opened)
}

// begin attaches what lets the kernel inherit, where no program steers, when the first
// socket listens: before, every later bind or listen would fail with EADDRINUSE. A
// newcomer that attaches nothing takes off what a process that has ended may have left
// on the group: it names sockets that are no more, and would starve this one's.
func (k *kernelSteering) begin(s *socket, req *request) {
	k.stop = keepLooking(k.a, k.space)
	if k.has == usersOwn || k.a.steering.byProgram() || req.pinned != nil {
		return
	}
	err := onSocket(s, useMigration)
	if err == nil {
		k.has = migrating
	} else if others, _ := k.strangers(); others > 0 || k.older {
		onSocket(s, func(fd int) error { return detachProgram(uintptr(fd)) })
	}
	k.publish(nil, err)
}

// pin attaches a pinned program, in the place of any other.
func (k *kernelSteering) pin(s *socket, path string) error {
	if err := onSocket(s, func(fd int) error { return usePinned(fd, path) }); err != nil {
		return err
	}
	k.giveUpMigration()
	k.has = pinned
	k.publish(nil, nil)
	return nil
}

func (k *kernelSteering) giveUpMigration() {
	if k.has == migrating {
		dropMigration()
	}
}

// settle puts the program in force that fits the members as they are now, or none if
// it may not be.
func (k *kernelSteering) settle() {
	if !k.a.steering.byProgram() {
		return
	}
	switch others, err := k.strangers(); {
	case err != nil:
		k.letGo(fmt.Errorf("it can't be told who else is in the kernel's group: %w", err))
	case others > 0:
		k.letGo(fmt.Errorf("steering by %v would starve others: %d of the sockets in the kernel's group are not this process's", k.a.steering, others))
	default:
		if err := k.attach(); err != nil {
			k.letGo(err)
		}
	}
}

// attach makes new connections go to the members' sockets, or by place to all.
func (k *kernelSteering) attach() error {
	var owned []*socket
	for _, l := range *k.a.members.Load() {
		owned = append(owned, l.role.(*owner).sockets()...)
	}
	if len(owned) == 0 {
		return nil // the address is ending
	}
	had := k.has
	if k.table != nil {
		err := k.table.fill(owned)
		for try := 0; k.older && k.has == noProgram && errors.Is(err, unix.EBUSY) && try < 100; try++ {
			time.Sleep(2 * time.Millisecond) // the table of the process before is about to be freed
			err = k.table.fill(owned)
		}
		if err != nil {
			return err
		}
		if k.has != byTable {
			if err := onSocket(owned[0], func(fd int) error { return attachProgram(fd, k.table.program) }); err != nil {
				return err
			}
			k.giveUpMigration()
			k.has, k.since = byTable, time.Now()
		}
	} else if places := len(k.open()); k.has != byPlace || places != k.places {
		if err := onSocket(owned[0], func(fd int) error { return attachClassic(fd, places) }); err != nil {
			return err
		}
		k.has, k.places = byPlace, places
	}
	if k.has != had {
		k.publish(nil, k.now.Load().noMigration)
		k.a.note(k.a.log, routine, "a program steers", "address", k.a.at, "by", k.a.steering)
	}
	return nil
}

// letGo takes the program out of force, in favour of the migrating one if that can be
// had.
func (k *kernelSteering) letGo(why error) {
	before := k.now.Load()
	members := *k.a.members.Load()
	if (k.has == byTable || k.has == byPlace) && len(members) > 0 {
		s := members[0].role.(*owner).s
		if k.table != nil && onSocket(s, useMigration) == nil {
			k.has = migrating
		} else {
			onSocket(s, func(fd int) error { return detachProgram(uintptr(fd)) })
			k.has = noProgram
		}
	}
	k.publish(why, before.noMigration)
	if before.notSteered == nil {
		k.a.note(k.a.log, trouble, "no program steers any more", "address", k.a.at, "reason", why)
	}
}

// tick is called once a second, where a program steers.
func (k *kernelSteering) tick() {
	k.settle()
	for k.has == byTable && time.Since(k.since) >= retireAfter {
		w := k.quiet()
		if w == nil || !k.a.unshare(w) {
			return
		}
		k.discard(w.s)
		k.a.note(k.a.log, routine, "the socket of a closed member is quiet and was closed", "address", k.a.at)
	}
}

// quiet returns the socket of a closed member that can be closed: nothing has been
// queued in it for a while, and nothing is steered to it. What is half-open migrates.
func (k *kernelSteering) quiet() *watch {
	for _, w := range *k.a.shared.Load() {
		if !w.ready.Load() && !w.s.readable() && time.Since(began)-time.Duration(w.used.Load()) >= retireAfter {
			return w
		}
	}
	return nil
}

// discard closes a socket that is not shared any more.
func (k *kernelSteering) discard(s *socket) {
	inodes := inodesOf([]*socket{s})
	s.discard()
	k.drop(s)
	if k.table != nil {
		k.table.drop(s)
	}
	k.space.lingerIfListed(k.a.at, inodes)
}

// bell returns what an Accept is to call when it returns a connection; nil for nothing.
func (k *kernelSteering) bell() func() {
	if k.sampler == nil {
		return nil
	}
	return k.sampler.awake
}

// inForce returns the steering that is in force, and why it isn't what was asked for.
func (k *kernelSteering) inForce() (Steering, error) {
	if why := k.now.Load().notSteered; why != nil {
		return SteerFlow, why
	}
	return k.a.steering, nil
}

// inherits tells whether the kernel would give the queue of this process to another
// one: nil, or why not. others are the sockets of other processes in the kernel's group.
func (k *kernelSteering) inherits() (others int, err error) {
	now := k.now.Load()
	others, err = k.strangers()
	switch migrates := now.program == migrating || now.program == byTable || now.program == pinned; {
	case err != nil:
		return 0, fmt.Errorf("it can't be told who else is in the kernel's group: %w", err)
	case !migrates && !k.space.migrates():
		return others, now.noMigration
	case others == 0:
		return 0, errors.New("no other process has a socket in the kernel's group")
	}
	return others, nil
}

// leave is called before the last sockets are closed. A classic program would go on
// for the others in the group, and starve them.
func (k *kernelSteering) leave(socks []*socket) {
	if k.has == byPlace && len(socks) > 0 {
		if others, err := k.strangersBut(socks); others > 0 || err != nil {
			onSocket(socks[0], func(fd int) error { return detachProgram(uintptr(fd)) })
		}
	}
	if k.a.steering.byProgram() {
		k.leaves = inodesOf(socks)
	}
}

// close ends everything, when the sockets are closed.
func (k *kernelSteering) close() {
	if k.stop != nil {
		k.stop()
	}
	if k.sampler != nil {
		k.sampler.stop()
	}
	k.giveUpMigration()
	if k.table != nil {
		k.table.close()
	}
	k.space.lingerIfListed(k.a.at, k.leaves)
	k.space.leave()
}

func onSocket(s *socket, f func(fd int) error) error {
	return control(s.conn, func(fd uintptr) error { return f(int(fd)) })
}
