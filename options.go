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

// An Option changes what Listen, ListenContext, ListenGroup, Dispatch or Keep do. Of an
// option that is given twice the last one counts.
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

// WithSteering is WithLB, with connections spread by s. The default is [SteerFlow]. All
// members of a group must ask for the same.
//
//   - SteerSource: a client address keeps its member. By the kernel on Linux, without
//     privilege; by the dispatcher everywhere, which waits at most 100 ms for a busy member.
//   - SteerLoad: the member with less to do. By the kernel on Linux with CAP_BPF: of two
//     members that a hash of the connection chooses, the one with the shorter queue; it
//     costs a goroutine. By the dispatcher: the member that has waited in Accept for longest.
//   - SteerCPU: the member of the CPU that received the connection, on Linux from 6.2.
//
// What cannot be had is [ErrUnsupported]; what isn't in force any more, because other
// processes have joined the address, is in [Info].Steering and Reason. Steering by source
// and load is for at most 1024 members; the next one is [ErrGroupFull]. A reuseport program
// that Control attaches is left alone. docs/steering.md says which to choose.
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
// WithLB it is called once more, on a probe socket that is closed again. The network
// namespace, the device to which Control binds and IPV6_V6ONLY belong to the address:
// listeners that differ in them are strangers to each other.
//
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
// loads itself. Loading takes CAP_BPF; any process that may read and write
// the file can use a pinned program. The pinned program replaces the one that is in
// force for the address, in all processes. Listen fails if it can't be used, with
// [ErrUnsupported] on other systems and where the kernel doesn't balance.
//
// The program's type is BPF_PROG_TYPE_SK_REUSEPORT, its expected attach type
// BPF_SK_REUSEPORT_SELECT_OR_MIGRATE; examples/pin pins one.
func WithPinnedProgram(path string) Option {
	return Option{"WithPinnedProgram", func(c *config) { c.lb, c.pinned = true, &path }}
}

// WithHandoff is WithLB, and lets the processes of this user that name the same directory
// inherit each other's sockets: a restart, a crash or a kill of any of them loses no queued
// connection while another one, or a keeper (see [Keep]), lives. It needs no privilege, no
// parent process and no supervisor.
//
// The path is that of a directory, from the root, of at most some 85 bytes. It is made with
// mode 0700 if it isn't there (its parent must be); otherwise it must belong to this user
// with mode 0700. All processes must be in one network namespace. If something is wrong,
// Listen's error says what to do. Several addresses may use one path.
//
// Listen and Close wait until the others have confirmed: a second at most, also for one
// that is stopped, whose sockets the others serve meanwhile. Each process takes a descriptor
// for each socket of the others. Without a keeper the port is free when the last process on
// it closes; if that one was killed, processes on other addresses of the directory keep its
// sockets for 30 s.
//
// Steering by source is [ErrUnsupported] together with it, and by load where the kernel
// balances. WithHandoff is ErrUnsupported on Windows, AIX, plan9 and wasm. docs/restarts.md
// has programs, units and commands by deployment, docs/how-it-works.md the rules.
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
// meanwhile, too. "systemctl stop" empties the store and closes the port.
//
// It takes sockets of a .socket unit as well: those of the address that systemd has
// opened, by LISTEN_FDS; FileDescriptorName= is ignored. With ReusePort=yes they are
// balanced by the kernel; a socket without it is shared by the dispatcher, and Info.Reason
// says so.
//
// A stored socket that no Listen asks for within 30 s of the start, or of the last Close
// on its address, is taken out of the store; until then the port is in use, and whoever
// connects waits. Closing takes nothing out: the process may be about to end. A unix
// socket's file stays with its socket.
//
// [Info] has InheritSystemd when systemd is known to hold all sockets: it has given them
// to this process, or its version (254 or later) tells that the store has room. It can be
// combined with [WithHandoff]. A process that systemd hasn't started, or whose unit has
// no FileDescriptorStoreMax=, just listens, and Info.Reason says so; with port 0
// too. LISTEN_PID or LISTEN_FDS that isn't a number is an error. On
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
	case noKernel == nil && r.noPrograms != nil && r.steering.byProgram():
		return fmt.Errorf("steering by %v: %w", r.steering, r.noPrograms)
	case noKernel == nil && kernelSteers(r.steering) != nil:
		return fmt.Errorf("steering by %v: %w", r.steering, kernelSteers(r.steering))
	}
	if noKernel == nil {
		return nil
	}
	return canDispatch(r.steering, r.network)
}
