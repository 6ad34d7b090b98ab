package lblisten

// The options, and what fits together.

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
)

// canDispatch tells whether the dispatcher knows a steering.
func canDispatch(s Steering, network string) error {
	switch {
	case s == SteerCPU:
		return fmt.Errorf("steering by cpu is %w by the dispatcher, which doesn't know the receiving CPU", ErrUnsupported)
	case s == SteerSource && network != "tcp" && network != "tcp4" && network != "tcp6":
		return fmt.Errorf("steering by source is %w on network %q: its connections have no source address", ErrUnsupported, network)
	}
	return nil
}

// An Option changes what Listen, ListenContext, ListenGroup or Dispatch do.
type Option struct {
	name  string
	apply func(*config)
}

// config is what the options of one call ask for. A nil pointer: the option isn't there.
type config struct {
	lb            bool
	dispatcher    bool // WithDispatcher
	requireKernel bool // WithRequireKernel
	reusePort     bool
	steering      Steering
	pinned        *string // WithPinnedProgram
	handoff       *string // WithHandoff
	systemd       bool    // WithSystemd
	backlog       *int
	lc            net.ListenConfig
	log           *slog.Logger
}

// WithLB joins the load-balancing group of the address: connections are spread
// over all its members, in this process and, where the kernel balances, in
// all processes of the same user. It needs no privilege. The address conflicts
// with listeners that are not balanced (EADDRINUSE), both ways round.
//
// All members of an address in a process belong to one group. A new member
// must fit it: one that asks for another balancer or another steering is
// refused.
func WithLB() Option {
	return Option{"WithLB", func(c *config) { c.lb = true }}
}

// WithDispatcher is WithLB, balanced by the in-process dispatcher whatever the
// system offers. Its members share one socket.
func WithDispatcher() Option {
	return Option{"WithDispatcher", func(c *config) { c.lb, c.dispatcher = true, true }}
}

// WithRequireKernel is WithLB, but Listen fails with [ErrUnsupported] where the
// kernel cannot balance, instead of using the dispatcher.
func WithRequireKernel() Option {
	return Option{"WithRequireKernel", func(c *config) { c.lb, c.requireKernel = true, true }}
}

// WithReusePort sets SO_REUSEPORT before bind and nothing else: several
// listeners can have one address, and what that means is the system's affair.
// Balancing isn't promised. It returns a plain listener of package net, can be
// used beside WithLB in the same program, and is an error together with it.
// It is [ErrUnsupported] on Windows, where it would let others steal the port, on
// Solaris and illumos, plan9 and wasm.
func WithReusePort() Option {
	return Option{"WithReusePort", func(c *config) { c.reusePort = true }}
}

// WithSteering is WithLB, with connections spread by s. The default is
// [SteerFlow]. All members of a group must ask for the same. What cannot be had
// is [ErrUnsupported].
//
// By the dispatcher, for which [WithDispatcher] asks:
//
//   - SteerSource waits at most 100 ms for a busy member, for at most 16
//     connections at a time, which are held in the process meanwhile; then the
//     next in rank takes the connection. Connections without a TCP address
//     (unix sockets) have no source: ErrUnsupported.
//   - SteerLoad prefers the member that has waited in Accept for longest.
//   - SteerCPU is ErrUnsupported.
//
// By the kernel, on Linux only:
//
//   - SteerSource takes no privilege. With CAP_BPF the kernel inherits as well;
//     without, a classic BPF program has the place of the one for that.
//   - SteerLoad takes CAP_BPF. Of two members that a connection's flow ranks first,
//     the one with the shorter queue gets it. The queues are looked at every ms
//     while there is traffic, which costs a goroutine.
//   - SteerCPU (from Linux 6.2, no privilege) gives every socket a CPU, and a
//     connection goes to the one of the CPU that received it.
//
// By source and load a program names the sockets that get something. It is in
// force only while all sockets of the address in the kernel's group are this
// process's, as it would starve the others: Listen fails if there are others,
// and when some join later the program is taken off within a second. Info then
// says SteerFlow, with the Reason. Both are for at most 1024 members: the next one
// is [ErrGroupFull]. With CAP_BPF sockets that closed members have left, and that no
// new member adopts, are closed when they have been quiet for three seconds.
//
// A reuseport program that Control attaches is left alone: nothing else is attached
// then, and steering by source and load are ErrUnsupported.
func WithSteering(s Steering) Option {
	return Option{"WithSteering", func(c *config) { c.lb, c.steering = true, s }}
}

// WithBacklog sets the length of the accept queue of a member's socket to n,
// which is at least 1. The default is the system's maximum, as in package net.
// The system silently cuts n to its maximum (Linux net.core.somaxconn, FreeBSD
// kern.ipc.soacceptqueue); Stats.Backlog tells what is in force. The
// dispatcher's members share one socket, and the last one that asks decides.
// Only unix systems can: [ErrUnsupported] elsewhere.
func WithBacklog(n int) Option {
	return Option{"WithBacklog", func(c *config) { c.backlog = &n }}
}

// WithListenConfig opens sockets with lc: Control, KeepAlive and
// KeepAliveConfig mean what they mean in package net. Control is called
// before bind and may set any option; a Control error is returned as it is. With
// WithLB it is called once more, for a socket that is closed again: by that the package
// finds out what the address is. The network namespace, the device to which Control
// binds and IPV6_V6ONLY belong to the address: listeners that differ in them are
// strangers to each other.
// A balanced socket is plain TCP: Multipath TCP, which lc may ask for, is off
// for it, because Linux neither migrates nor steers MPTCP sockets. On Linux and
// FreeBSD the keep-alive is set once, on the listening socket, before the bind and
// after Control; its connections have exactly what package net would have given
// them. A member that adopts a closed member's socket finds it open already: of
// its lc the keep-alive is used, but not Control. One that joins the
// dispatcher's socket uses nothing of lc.
func WithListenConfig(lc net.ListenConfig) Option {
	return Option{"WithListenConfig", func(c *config) { c.lc = lc }}
}

// WithPinnedProgram is WithLB, and makes Linux's kernel inherit by the BPF
// program that is pinned at path in a BPF file system, instead of one that Listen
// loads itself. Loading takes CAP_BPF; a pinned program any process can use that
// may read and write the file. It takes the place of the program that is in
// force for the address, in all processes. Listen fails if it can't be used, with
// [ErrUnsupported] on other systems and where the kernel doesn't balance.
//
// The program's type is BPF_PROG_TYPE_SK_REUSEPORT, its expected attach type
// BPF_SK_REUSEPORT_SELECT_OR_MIGRATE; examples/pin pins one.
func WithPinnedProgram(path string) Option {
	return Option{"WithPinnedProgram", func(c *config) { c.lb, c.pinned = true, &path }}
}

// WithHandoff is WithLB, and lets the processes of this user that name the same directory
// inherit each other's sockets, so that a restart, a crash or a kill of any of them loses
// no queued connection. It takes no privilege, no parent process and no supervisor. Each
// process holds a duplicate of every listening socket of the others; when one goes away,
// however it goes, the others accept from its sockets at once, and the next process that
// listens adopts them. Where the kernel doesn't balance, all processes accept from one
// socket, so several can have one address there too. Several addresses may use one path.
//
// The path is that of a directory, from the root, of at most some 85 bytes. It is made with
// mode 0700 if it isn't there (its parent must be); otherwise it must belong to this user
// with mode 0700. Nobody else can reach what is in it then, so it may be in /tmp or in a
// Kubernetes emptyDir. Each process has a unix socket of its own in it, which is removed
// when it ends, or by the others when it was killed. A wrong path, and a process of another
// network namespace that uses it, is an error of Listen that says what to do.
//
// No process waits for another for longer than about a second. One that doesn't answer
// for a second (it is stopped, by SIGSTOP say) isn't waited for again, and its sockets are
// served by the others; when it goes on they are its own again. Nobody asks while nothing
// happens: but a socket in which connections stay queued has its owner asked, after some
// three seconds.
//
// When the last process on an address closes, its sockets are closed before Close returns,
// so the port is free. When it was killed, processes that listen elsewhere keep its sockets
// for 30 s, for the next one on the address. While a keeper lives (see [Keep]) they are
// kept, however the last one went: a service of one process needs that.
//
// A process takes a duplicate, one descriptor, for each socket of the others, as long as it
// has a quarter of its limit left; otherwise it refuses, [Info].Reason of the other says so,
// and it takes them when it has descriptors again. A new listener adopts a socket that an
// ended one has left before it opens another, so restarts don't add any; one that joins
// while somebody doesn't answer may open its own.
//
// Steering by source is [ErrUnsupported] together with it, and by load too where the kernel
// balances. So is WithHandoff itself on Windows, AIX, plan9 and wasm.
func WithHandoff(path string) Option {
	return Option{"WithHandoff", func(c *config) { c.lb, c.handoff = true, &path }}
}

// WithSystemd is WithLB, and has systemd keep the listening sockets, so that a service of
// one process loses no queued connection when it is restarted, crashes or is killed. The
// unit needs
//
//	FileDescriptorStoreMax=64
//
// and a Type that fits the program: notify, if it says READY=1, as package lbhttp does.
// Each socket that Listen opens is put into systemd's store of file descriptors
// (FDSTORE), and the next process of the service finds it there: a listener of the same
// address has it from the beginning, with all that is queued. New connections are queued
// meanwhile, too. "systemctl stop" empties the store and ends the port.
//
// It takes sockets of a .socket unit as well: those of the address that systemd has
// opened, by LISTEN_FDS; names don't matter. With ReusePort=yes they are balanced by the
// kernel; one that isn't is shared by the dispatcher, and Info.Reason says so.
//
// What is in the store and no Listen asks for within 30 s of the start, or of the last
// Close on its address, is taken out of it. Closing takes nothing out: the process may be
// about to end. Until then the port is in use, and whoever connects waits. A unix socket's file stays with its socket.
//
// [Info] has InheritSystemd when systemd is known to hold all sockets: it has given them
// to this process, or its version (254 or later) tells that the store has room. It can be
// combined with [WithHandoff]. A process that systemd hasn't started, or whose unit has
// no FileDescriptorStoreMax=, just listens, and Info.Reason says so; so it does if the
// system chooses the port. LISTEN_PID or LISTEN_FDS that isn't a number is an error. On
// systems other than Linux it is [ErrUnsupported].
func WithSystemd() Option {
	return Option{"WithSystemd", func(c *config) { c.lb, c.systemd = true, true }}
}

// WithLogger logs fallbacks and inheritance to l. Nothing is logged without it.
func WithLogger(l *slog.Logger) Option {
	return Option{"WithLogger", func(c *config) { c.log = l }}
}

func newConfig(opts []Option) (*config, error) {
	c := new(config)
	for _, o := range opts {
		if o.apply == nil {
			return nil, errors.New("an Option that no With function made")
		}
		o.apply(c)
	}
	if c.handoff != nil && filepath.IsAbs(*c.handoff) {
		clean := filepath.Clean(*c.handoff)
		c.handoff = &clean
	}
	switch {
	case c.backlog != nil && *c.backlog < 1:
		return nil, fmt.Errorf("WithBacklog(%d): a backlog is at least 1; leave the option out for the system's maximum", *c.backlog)
	case c.backlog != nil && !canSetBacklog:
		return nil, fmt.Errorf("WithBacklog: %w by this system", ErrUnsupported)
	case c.pinned != nil && !system.pinned:
		return nil, fmt.Errorf("WithPinnedProgram: %w by this system", ErrUnsupported)
	case c.pinned != nil && *c.pinned == "":
		return nil, errors.New("WithPinnedProgram: the path is empty")
	case c.pinned != nil && c.dispatcher:
		return nil, fmt.Errorf("WithPinnedProgram: %w by the dispatcher, which WithDispatcher asks for", ErrUnsupported)
	case c.handoff != nil && *c.handoff == "":
		return nil, errors.New("WithHandoff: the path is empty: name a directory, such as /run/NAME/handoff")
	case c.handoff != nil && !canHandoff:
		return nil, fmt.Errorf("WithHandoff: %w by this system", ErrUnsupported)
	case c.systemd && !canSystemd:
		return nil, fmt.Errorf("WithSystemd: %w by this system, which has no systemd", ErrUnsupported)
	case c.handoff != nil && c.steering == SteerSource:
		return nil, fmt.Errorf("WithHandoff: steering by source is %w together with it: processes that take over from each other can't keep a source to one member", ErrUnsupported)
	case c.lb && c.reusePort:
		return nil, errors.New("WithReusePort promises no balancing and WithLB does: choose one for an address")
	case c.dispatcher && c.requireKernel:
		return nil, errors.New("WithDispatcher and WithRequireKernel contradict each other")
	case c.steering < SteerFlow || c.steering > SteerLoad:
		return nil, fmt.Errorf("WithSteering(%d): no such steering", int(c.steering))
	}
	return c, nil
}

// fits tells whether a new address can be as it is asked for: nil, or why not.
// noKernel is why the kernel doesn't balance there, nil if it does.
func (r *request) fits(noKernel error) error {
	switch {
	case noKernel == errAsked:
	case noKernel != nil && r.pinned != nil:
		return fmt.Errorf("WithPinnedProgram: %w: %w", ErrUnsupported, noKernel)
	case noKernel != nil && r.requireKernel:
		return fmt.Errorf("balancing by the kernel is %w: %w", ErrUnsupported, noKernel)
	case noKernel == nil && r.handoff != nil && r.steering == SteerLoad:
		return fmt.Errorf("WithHandoff: steering by load is %w together with it where the kernel balances, because its program would starve the other processes: use WithDispatcher", ErrUnsupported)
	case noKernel == nil && r.program && r.steering.byProgram():
		return fmt.Errorf("steering by %v is %w on a socket to which Control attaches a reuseport program: the address has one program", r.steering, ErrUnsupported)
	case noKernel == nil && r.program && r.pinned != nil:
		return fmt.Errorf("WithPinnedProgram: %w on a socket to which Control attaches a reuseport program: the address has one program", ErrUnsupported)
	case noKernel == nil && kernelSteers(r.steering) != nil:
		return fmt.Errorf("steering by %v: %w", r.steering, kernelSteers(r.steering))
	}
	if noKernel == nil {
		return nil
	}
	return canDispatch(r.steering, r.network)
}
