// Package lblisten is a drop-in for [net.Listen] that spreads connections over several
// accept loops or processes, and keeps the queued connections when one of them goes away,
// while a sibling, another process, a keeper or systemd holds its socket.
//
//	ln, err := lblisten.Listen("tcp", ":8080", lblisten.WithLB()) // was: net.Listen("tcp", ":8080")
//
// # What changes when I replace net.Listen
//
// Without options nothing: Listen is net.Listen, and [WithBacklog], [WithListenConfig] and
// [WithReusePort] change what it opens. With [WithLB], or an option that says that it is
// WithLB too, the listener joins the others of its address, in this process and, where the
// kernel balances, in others of the same user. Accept still returns a bare *net.TCPConn with
// the options that package net sets, and its errors; deadlines, File and SyscallConn work.
// MPTCP is off, because balanced sockets can't have it. Close hands over the queued
// connections instead of resetting them, if a sibling lives.
//
// Words: a member is what Listen returns, the listener of one accept loop. A group is all
// members of one address in this process; they are siblings. A socket is a listening socket
// of the kernel. A queued connection is one whose handshake is done and that no Accept has
// returned. The balancer spreads connections over the members. Inheritance is what happens
// to the queued connections of a member that goes away: a sibling, the heir, gets them.
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
// [Listener.Info] says which of the two is in force, and its Reason what is missing;
// [WithRequireKernel] has Listen fail instead of using the dispatcher.
//
// # What is lost, and when
//
// When a member closes while another member of its group in this process
// lives, nothing is lost: its socket stays open and its siblings accept from
// it too, until a new member adopts it. Nothing is accepted before an Accept
// asks for it, so what is queued stays in the kernel. When the last member
// closes, or the process dies, queued connections are reset by the kernel, unless another
// process inherits them: by [WithHandoff], on any unix and without privilege, or by
// the kernel itself: DragonFly's always, Linux's under the conditions below. A service of one
// process, which is stopped and then started, loses nothing while systemd or a keeper
// holds its sockets: see [WithSystemd] and [Keep].
//
// # Which privilege buys what
//
// Two things take one: inheritance by Linux's kernel, which isn't needed with [WithHandoff],
// and [SteerLoad] where the kernel balances. From Linux 5.14 the kernel can give the queue of
// a process that dies to the other processes on the address, half-open connections
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
// socket under saturation, so within a process siblings take the socket over, as on
// other systems. Kernels before the fix of CVE-2026-46015 don't wake the heir: once a
// second a goroutine, with a thread that sleeps, looks for what was migrated.
//
// Without CAP_BPF or CAP_SYS_ADMIN bpf(2) is never called: a filter of system calls, such
// as systemd's SystemCallFilter=@system-service, may kill a process that calls it.
//
// # Containers, systemd, Kubernetes, macOS, Windows
//
// Processes share an address if they are in one network namespace and of one user:
// two containers of a pod are, two pods aren't. For WithHandoff they need a common
// directory too, such as one in a volume of the pod, or in systemd's RuntimeDirectory=.
// [WithSystemd] takes sockets that systemd has opened (socket activation), and has systemd
// keep those that Listen opens. On macOS and Windows members use the dispatcher. A second
// process on an address fails with EADDRINUSE there, on macOS unless both use WithHandoff.
//
// # How do I restart without downtime
//
// With WithSystemd: systemctl restart. With WithHandoff and a keeper: stop the old process,
// start the new one. Without a keeper, start the new one first, and when its Listen has
// returned, end the old one; while a third process lives the old one may go first. A
// process that ends should close its listeners first, answer what it has accepted, and then
// exit: package lbhttp does that for an http.Server. If nobody holds the sockets when the
// last process ends, queued connections are reset, and new ones refused until the next one
// has returned from Listen.
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
	"net"
)

// Listen is [net.Listen] with options. Without options it is exactly
// net.Listen; with them it takes every network that net.Listen takes: "tcp",
// "tcp4", "tcp6", "unix" and "unixpacket".
//
// With [WithLB], or an option that implies it, the listener is a [*Listener].
// Listening twice on one address joins the same group, however the address is
// spelled; port 0 always opens a new group, and Addr tells its port. The same
// path of a unix socket is the same group. If its file is gone, or another file is
// there, a member that joins binds the path anew, as package net does, and the clients
// of the old file are still served. The file is removed when the last member closes.
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
	_, members, err := open(ctx, network, address, 1, cfg)
	if err != nil {
		return nil, err
	}
	return members[0], nil
}

// ListenGroup opens n members of one address at once, n from 1 to 32768. It
// implies WithLB. Where the kernel balances that needs n file descriptors. The context is
// for opening only, as that of ListenContext: when it ends later, the group stays.
func ListenGroup(ctx context.Context, network, address string, n int, opts ...Option) (*Group, error) {
	cfg, err := newConfig(append([]Option{WithLB()}, opts...))
	if err == nil {
		err = checkCount(n)
	}
	if err != nil {
		return nil, listenError(network, address, err)
	}
	a, members, err := open(ctx, network, address, n, cfg)
	if err != nil {
		return nil, err
	}
	return &Group{a: a, members: members}, nil
}

// Dispatch fans any listener out over n members, n from 1 to 32768: the
// in-process dispatcher on top of ln. Connections stay what ln makes of them.
// It takes WithSteering and WithLogger; every other option is an error.
//
// From then on ln belongs to the group: its last member closes ln. An error, a panic or
// runtime.Goexit in ln.Accept reaches only the Accept that caused it; (nil, nil) becomes a
// temporary error. If Dispatch returns an error, ln is untouched.
//
// Dispatch asks a connection for its addresses only if it is package net's, or a *tls.Conn
// over one: RemoteAddr of other types may block until the client has sent something (PROXY
// protocol). Any other connection goes to any member, also with SteerSource; Info.Reason
// says so then.
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
	if addr == nil {
		return nil, fmt.Errorf("lblisten: dispatch: the listener (a %T) has no address", ln)
	}
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
	a, members := dispatchAddress(ln, addr, n, cfg)
	return &Group{a: a, members: members}, nil
}

// Keep is the keeper of a handoff until ctx ends: it holds a duplicate of every socket of
// the processes that name path with [WithHandoff], and accepts from none. While a keeper
// lives, and the queues have room, no queued connection is reset and no new one refused, in
// whatever order those processes end: by Close, exit, SIGTERM or SIGKILL, and all of them at
// once too. The next one adopts their sockets. So a service of one process, which is stopped
// and then started, loses nothing; its clients wait meanwhile.
//
// Run it as a program, cmd/lbkeep, or from a process that outlives the others, such as a
// prefork master. Several may keep one path. To replace one, start the second, then end the
// context of the first: it returns once the second has everything. While it keeps them, the
// addresses are in use; as long as nobody starts, what is queued waits, and a full queue
// drops new connections (on FreeBSD it resets them).
//
// It takes [WithLogger]; every other option is an error. It fails if path can't be used (see
// [WithHandoff]), and with [ErrUnsupported]. When ctx ends it returns nil.
func Keep(ctx context.Context, path string, opts ...Option) error {
	for _, o := range opts {
		if o.name != "WithLogger" {
			return fmt.Errorf("lblisten: Keep: option %s is for a listener; Keep takes WithLogger", o.name)
		}
	}
	cfg, err := newConfig(opts)
	if err != nil {
		return fmt.Errorf("lblisten: Keep: %w", err)
	}
	return keep(ctx, path, 0, cfg.log)
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
	if cfg.backlog != nil {
		if err := setBacklog(ln, *cfg.backlog); err != nil {
			ln.Close()
			return nil, listenError(network, address, err)
		}
	}
	return ln, nil
}
