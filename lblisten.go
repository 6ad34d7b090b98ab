// Package lblisten is a drop-in for [net.Listen] that spreads connections over
// several accept loops or processes, and loses no connection when one of them
// goes away.
//
//	ln, err := lblisten.Listen("tcp", ":8080", lblisten.WithLB()) // was: net.Listen("tcp", ":8080")
//
// # What changes when I replace net.Listen
//
// Without options nothing: Listen is net.Listen. With [WithLB] and its relatives the
// listener joins the others of its address, in this process and, where the kernel
// balances, in others of the same user. Accept still returns a bare *net.TCPConn with
// the options that package net sets, and its errors; deadlines, File and
// SyscallConn work. MPTCP is off, because balanced sockets can't have it. Close hands over what
// waits instead of resetting it, if a sibling lives.
//
// Words: a listener, or member, is what Listen returns: one accept queue of a group.
// A group is all members of one address in this process. A socket is a
// listening socket of the kernel. The balancer spreads connections over the
// members. Inheritance is what happens to the connections that wait in a closing
// member's queue: a sibling, the heir, gets them.
//
// # Which balancer did I get
//
// Where the kernel balances (Linux with SO_REUSEPORT, FreeBSD from 12 with
// SO_REUSEPORT_LB, DragonFly with SO_REUSEPORT) every member has a socket of
// its own and Accept takes from it directly: no goroutine, no lock and no
// allocation is added to what package net does. Several processes can listen
// on one address then. Everywhere else, for unix sockets, and with
// [WithDispatcher], the members of a process share one socket and take turns
// at accepting from it; each connection goes to the member that rendezvous
// hashing of its addresses ranks first among those that wait in Accept.
// [Listener.Info] says which of them is in force, and why nothing stronger is;
// [WithRequireKernel] makes an error of the second.
//
// # What is lost when
//
// When a member closes while another member of its group in this process
// lives, nothing is lost: its socket stays open and its siblings accept from
// it too, until a new member adopts it. Nothing is accepted before an Accept
// asks for it, so what waits, waits in the kernel. When the last member
// closes, or the process dies, what waits is reset by the kernel, unless another
// process inherits it: by [WithHandoff], on any unix and without privilege, or by
// the kernel itself, as DragonFly's does, and that of Linux as below.
//
// # Which privilege buys what
//
// None is needed for anything but the inheritance by Linux's kernel, which
// [WithHandoff] makes needless. From Linux 5.14 the kernel can give the queue of a
// process that dies to the other processes on the address, half-open connections
// included. One of these is enough:
//
//   - The process has CAP_BPF (from 5.8; CAP_SYS_ADMIN before): Listen loads a BPF
//     program of three instructions. For a systemd unit: AmbientCapabilities=CAP_BPF;
//     for a container: --cap-add BPF, and a seccomp profile that allows bpf(2).
//   - A privileged process has pinned that program: [WithPinnedProgram].
//   - The sysctl net.ipv4.tcp_migrate_req is 1, in the network namespace of the
//     process. It is for IPv6 as well.
//
// [Info].OnKill says whether it is in force, and Reason what is missing. The
// kernel's migration itself loses about one connection in 1000 closes of a
// socket under saturation, so inside a process sockets are inherited as
// everywhere. Kernels before the fix of 2026 ("tcp: call sk_data_ready() after
// listener migration") don't wake the heir: waiting Accepts look at their sockets once a
// second, for which a process has one goroutine, with a thread that sleeps.
//
// [SteerLoad] takes CAP_BPF too where the kernel balances; the other steerings, and
// all of the dispatcher's, take no privilege.
//
// Sockets that closed members left, and no new member adopts, are closed a few
// seconds after nothing was steered to them any more, as long as all sockets of
// the address belong to the process and no handoff holds them too (Linux).
//
// # Containers, systemd, Kubernetes, macOS, Windows
//
// Processes share an address if they are in one network namespace and of one user:
// two containers of a pod are, two pods aren't. For WithHandoff they need a common
// directory too, such as a volume of the pod. systemd's RuntimeDirectory= makes one that fits. A
// socket that systemd has opened (socket activation) is balanced in this process by
// [Dispatch]. macOS and Windows balance nothing, so members are the dispatcher's; a
// second process on an address is EADDRINUSE there, on macOS but with WithHandoff.
//
// # How do I restart without downtime
//
// With WithHandoff a service of one or more processes is restarted without losing
// anything: start the new process, and when its Listen has returned, end the old
// one. While a third process lives the old one may go first. A process that ends
// should close its listeners first, answer what it has accepted, and then exit;
// examples/restart does so. If the last process ends before the next has returned
// from Listen, what waits is reset.
//
// # Errors
//
// Listen, ListenContext and ListenGroup return errors of type [*net.OpError]
// as package net does; use [errors.Is] with [ErrUnsupported], [ErrGroupFull]
// and the system's errors, such as syscall.EADDRINUSE.
package lblisten

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"syscall"
)

var (
	// ErrUnsupported is what this system, network or address cannot do. It is
	// also an errors.ErrUnsupported.
	ErrUnsupported error = unsupported{}

	// ErrGroupFull is returned for a member past the limit of a group: 256
	// sockets on FreeBSD and DragonFly, whose kernels would let a 257th listen
	// and never give it a connection, and 32768 elsewhere, the limit of Linux.
	ErrGroupFull = errors.New("the group is full")
)

type unsupported struct{}

func (unsupported) Error() string        { return "not supported" }
func (unsupported) Is(target error) bool { return target == errors.ErrUnsupported }

// Balancer is who spreads connections over the members of a group.
type Balancer int

const (
	BalancerNone       Balancer = iota // nobody: there is no group
	BalancerKernel                     // the kernel, between sockets
	BalancerDispatcher                 // this process, between Accepts
)

// String returns "none", "dispatcher", or the socket option by which the
// kernel of this system balances: "SO_REUSEPORT" or "SO_REUSEPORT_LB".
func (b Balancer) String() string {
	switch b {
	case BalancerNone:
		return "none"
	case BalancerKernel:
		return kernelOption
	case BalancerDispatcher:
		return "dispatcher"
	}
	return fmt.Sprintf("Balancer(%d)", int(b))
}

// Steering is by what connections are spread over the members of a group.
type Steering int

const (
	// SteerFlow hashes the addresses and ports of both ends.
	SteerFlow Steering = iota
	// SteerSource hashes the client's address, so that all its connections go
	// to one member.
	SteerSource
	// SteerCPU goes by the CPU that received the connection.
	SteerCPU
	// SteerLoad goes by how busy the members are.
	SteerLoad
)

// String returns "flow", "source", "cpu" or "load".
func (s Steering) String() string {
	switch s {
	case SteerFlow:
		return "flow"
	case SteerSource:
		return "source"
	case SteerCPU:
		return "cpu"
	case SteerLoad:
		return "load"
	}
	return fmt.Sprintf("Steering(%d)", int(s))
}

// Inheritance is a set of those who take over what waits for a member that
// goes away. The zero value is nobody: the kernel resets it.
type Inheritance int

const (
	InheritProcess Inheritance = 1 << iota // siblings in this process
	InheritKernel                          // any socket of the kernel's group
	InheritHandoff                         // other processes that hold the socket
)

// String returns "none", or the parts joined by "+": "process+kernel".
func (i Inheritance) String() string {
	var parts []string
	for _, p := range []struct {
		bit  Inheritance
		name string
	}{{InheritProcess, "process"}, {InheritKernel, "kernel"}, {InheritHandoff, "handoff"}} {
		if i&p.bit != 0 {
			parts = append(parts, p.name)
			i &^= p.bit
		}
	}
	if i != 0 {
		parts = append(parts, fmt.Sprintf("Inheritance(%d)", int(i)))
	}
	if parts == nil {
		return "none"
	}
	return strings.Join(parts, "+")
}

// Info is what is in force for a listener or a group at this moment.
type Info struct {
	Balancer Balancer
	Steering Steering
	OnClose  Inheritance // who would take over if the member closed now
	OnKill   Inheritance // who would take over if the process were killed now
	Members  int         // members of the group in this process
	Sockets  int         // kernel sockets of the group in this process
	Reason   error       // why nothing stronger is in force; nil if nothing is
}

// Stats are the counters of a listener, or their sums over a group.
type Stats struct {
	Accepted  uint64 // connections that Accept has returned
	Inherited uint64 // those of them that came through a closed member's socket

	// Queued connections wait in the kernel for Accept: in the member's own
	// socket, or in the shared one if it has none. Backlog is the limit in
	// force for them. Both are -1 where the system doesn't tell: it is told for
	// TCP on Linux, and on FreeBSD.
	Queued, Backlog int
}

// An Option changes what Listen, ListenContext, ListenGroup or Dispatch do.
type Option struct {
	name  string
	apply func(*config)
}

// config is what the options of one call ask for.
type config struct {
	lb            bool
	dispatcher    bool // WithDispatcher
	requireKernel bool // WithRequireKernel
	reusePort     bool
	steering      Steering
	pinned        string // WithPinnedProgram
	pinnedSet     bool
	handoff       string // WithHandoff
	handoffSet    bool
	backlog       int
	backlogSet    bool
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
// says SteerFlow, with the Reason. Both are for at most 1024 members.
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
	return Option{"WithBacklog", func(c *config) { c.backlog, c.backlogSet = n, true }}
}

// WithListenConfig opens sockets with lc: Control, KeepAlive and
// KeepAliveConfig mean what they mean in package net. Control is called
// before bind and may set any option; a Control error is returned as it is.
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
	return Option{"WithPinnedProgram", func(c *config) { c.lb, c.pinned, c.pinnedSet = true, path, true }}
}

// WithHandoff is WithLB, and lets the processes of this user that name the same
// path inherit each other's sockets, so that a restart, a crash or a kill of any
// of them loses nothing that waits. It takes no privilege, no parent process and
// no supervisor. Each process holds a duplicate of every listening socket of the
// set; when one goes away, however it goes, the others accept from its sockets
// at once, and the next process that listens adopts them. Where the kernel
// doesn't balance, all processes accept from one socket, so several can have one
// address there too. Several addresses may use one path.
//
// The path is that of a unix socket, which the package makes. It can be some 90
// bytes long. Its directory must belong to this user or root, and nobody else may
// write to it: /run/NAME of a service, say. (On OpenBSD, NetBSD, DragonFly and
// Solaris, where it can't be told whose a process is, it must belong to this
// user with mode 0700.) Beside it are a lock file, path + ".lock", which stays,
// and for a moment path + ".new". Leave all three alone while processes live.
//
// No Listen waits for other processes for longer than about a second. When they
// don't answer, because the process that happens to connect them is stopped, it
// goes on without them, Info has the Reason, and it is tried again in the
// background. A wrong path is an error.
//
// A process that says nothing for 3 s (it is stopped, by SIGSTOP say) is taken for
// gone: the others accept from its sockets as well, until it goes on. When the
// last process on an address closes, its sockets are closed, and what waits is
// reset; when it was killed, and other processes of the set live that listen
// elsewhere, they keep the sockets for 30 s, for the next one on the address. A
// stopped process keeps the sockets that it holds open, also those of an address
// whose processes have all ended: what arrives there waits until it goes on.
// One that is the last on a unix socket as far as it knows, and closes at the
// moment in which it goes on, removes the socket's file, also if others have given
// it up for gone meanwhile and serve the socket.
//
// All processes of a path must be in one network namespace. A process hands off
// at most 256 sockets; what is past that goes with it. A new listener adopts a
// socket that an ended one has left before it opens another, so that restarts
// don't add any; one that joins while the others don't answer does open its own,
// and it stays. Steering by source is [ErrUnsupported]
// together with it, and by load too where the kernel balances. So is WithHandoff
// itself on Windows, AIX, plan9 and wasm. Surplus sockets of closed members aren't
// retired (see Linux above); the next member that joins adopts one.
func WithHandoff(path string) Option {
	return Option{"WithHandoff", func(c *config) { c.lb, c.handoff, c.handoffSet = true, path, true }}
}

// WithLogger logs fallbacks and inheritance to l. Nothing is logged without it.
func WithLogger(l *slog.Logger) Option {
	return Option{"WithLogger", func(c *config) { c.log = l }}
}

// Listen is [net.Listen] with options. Without options it is exactly
// net.Listen; with them it takes every network that net.Listen takes: "tcp",
// "tcp4", "tcp6", "unix" and "unixpacket".
//
// With [WithLB], or an option that implies it, the listener is a [*Listener].
// Listening twice on one address joins the same group, however the address is
// spelled; port 0 always opens a new group, and Addr tells its port. The same
// path of a unix socket is the same group; its file is removed when the last
// member closes.
//
// The error is a *net.OpError that names the address.
func Listen(network, address string, opts ...Option) (net.Listener, error) {
	return ListenContext(context.Background(), network, address, opts...)
}

// ListenContext is Listen with a context, which is for resolving the address
// and opening the listener only: the listener outlives it.
func ListenContext(ctx context.Context, network, address string, opts ...Option) (net.Listener, error) {
	cfg, err := newConfig(opts)
	if err != nil {
		return nil, listenError(network, address, err)
	}
	if !cfg.lb {
		return listenPlain(ctx, network, address, cfg)
	}
	_, members, err := join(ctx, network, address, 1, cfg)
	if err != nil {
		return nil, err
	}
	return members[0], nil
}

// ListenGroup opens n members of one address at once, n from 1 to 32768. It
// implies WithLB. Where the kernel balances that needs n file descriptors.
func ListenGroup(ctx context.Context, network, address string, n int, opts ...Option) (*Group, error) {
	cfg, err := newConfig(append([]Option{WithLB()}, opts...))
	if err == nil {
		err = checkCount(n)
	}
	if err != nil {
		return nil, listenError(network, address, err)
	}
	g, members, err := join(ctx, network, address, n, cfg)
	if err != nil {
		return nil, err
	}
	return &Group{g: g, members: members}, nil
}

// Dispatch fans any listener out over n members, n from 1 to 32768: the
// in-process dispatcher on top of ln. Connections stay what ln makes of them.
// It takes WithSteering and WithLogger; every other option is an error.
//
// From then on ln belongs to the group: its last member closes ln, and an error
// that ends ln ends every member. One that may pass (EMFILE) fails one Accept,
// and ln is tried again when the next Accept asks. If Dispatch returns an
// error, ln is untouched.
//
// If ln has no SetDeadline (as those of tls.NewListener, netutil.LimitListener
// and cmux have none) its Accept can't be interrupted. A goroutine accepts
// then, started only while a member waits, and at most one connection may be in
// hand when the waiting member closes or times out: the next Accept of any
// member gets it, and the last Close closes it.
func Dispatch(ln net.Listener, n int, opts ...Option) (*Group, error) {
	if ln == nil {
		return nil, errors.New("lblisten: dispatch: the listener is nil")
	}
	addr := ln.Addr()
	fail := func(err error) (*Group, error) {
		return nil, &net.OpError{Op: "dispatch", Net: addr.Network(), Addr: addr, Err: err}
	}
	for _, o := range opts {
		if o.name != "WithSteering" && o.name != "WithLogger" {
			return fail(fmt.Errorf("option %s is for opening a socket; Dispatch takes WithSteering and WithLogger", o.name))
		}
	}
	cfg, err := newConfig(append([]Option{WithDispatcher()}, opts...))
	if err == nil {
		err = checkCount(n)
	}
	if err == nil {
		err = canDispatch(cfg.steering, addr.Network())
	}
	if err != nil {
		return fail(err)
	}
	g, members := dispatchGroup(ln, n, cfg)
	return &Group{g: g, members: members}, nil
}

// maxMembers is the most members of a group in one process. It is Linux's limit
// of sockets in a reuseport group (net/core/sock_reuseport.c).
const maxMembers = 32768

func checkCount(n int) error {
	switch {
	case n < 1:
		return fmt.Errorf("a group of %d members: ask for at least 1", n)
	case n > maxMembers:
		return fmt.Errorf("a group of %d members: %w: ask for at most %d", n, ErrGroupFull, maxMembers)
	}
	return nil
}

func newConfig(opts []Option) (*config, error) {
	c := new(config)
	for _, o := range opts {
		if o.apply == nil {
			return nil, errors.New("an Option that no With function made")
		}
		o.apply(c)
	}
	if c.handoffSet && c.handoff != "" {
		if abs, err := filepath.Abs(c.handoff); err == nil {
			c.handoff = abs
		}
	}
	switch {
	case c.backlogSet && c.backlog < 1:
		return nil, fmt.Errorf("WithBacklog(%d): a backlog is at least 1; leave the option out for the system's maximum", c.backlog)
	case c.backlogSet && !canSetBacklog:
		return nil, fmt.Errorf("WithBacklog: %w by this system", ErrUnsupported)
	case c.pinnedSet && !canPin:
		return nil, fmt.Errorf("WithPinnedProgram: %w by this system", ErrUnsupported)
	case c.pinnedSet && c.pinned == "":
		return nil, errors.New("WithPinnedProgram: the path is empty")
	case c.pinnedSet && c.dispatcher:
		return nil, fmt.Errorf("WithPinnedProgram: %w by the dispatcher, which WithDispatcher asks for", ErrUnsupported)
	case c.handoffSet && c.handoff == "":
		return nil, errors.New("WithHandoff: the path is empty")
	case c.handoffSet && !canHandoff:
		return nil, fmt.Errorf("WithHandoff: %w by this system", ErrUnsupported)
	case c.handoffSet && c.steering == SteerSource:
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

// listenPlain returns a listener of package net itself.
func listenPlain(ctx context.Context, network, address string, cfg *config) (net.Listener, error) {
	lc := cfg.lc
	if cfg.reusePort {
		if !canReusePort {
			return nil, listenError(network, address, fmt.Errorf("WithReusePort: %w by this system", ErrUnsupported))
		}
		lc.Control = chainControl(lc.Control, reusePort)
	}
	ln, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if cfg.backlogSet {
		if err := setBacklog(ln, cfg.backlog); err != nil {
			ln.Close()
			return nil, listenError(network, address, err)
		}
	}
	return ln, nil
}

// chainControl calls the user's Control first, so that ours has the last word.
func chainControl(user, ours func(string, string, syscall.RawConn) error) func(string, string, syscall.RawConn) error {
	if user == nil {
		return ours
	}
	return func(network, address string, c syscall.RawConn) error {
		if err := user(network, address, c); err != nil {
			return err
		}
		return ours(network, address, c)
	}
}

// namedAddr is an address as the caller spelled it, for errors.
type namedAddr struct{ network, address string }

func (a namedAddr) Network() string { return a.network }
func (a namedAddr) String() string  { return a.address }

// listenError makes err the error of listening on address, if it isn't yet.
func listenError(network, address string, err error) error {
	if _, ok := err.(*net.OpError); ok {
		return err
	}
	return &net.OpError{Op: "listen", Net: network, Addr: namedAddr{network, address}, Err: err}
}
