package lblisten

// Group, as its user sees it, and the registry of addresses. How members join an
// address and leave it is in address.go.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

// A Group is n members of one address that were opened together. Other
// listeners of the address in this process are balanced with them; Close doesn't
// close them.
type Group struct {
	a       *address
	members []*Listener
}

// Listeners returns the members, which may be used and closed one by one. The
// slice is the caller's.
func (g *Group) Listeners() []*Listener { return append([]*Listener(nil), g.members...) }

// Addr returns the address that all members share.
func (g *Group) Addr() net.Addr { return g.a.addr }

// Serve runs serve on every member, each in a goroutine of its own. At the
// first error it closes the group, so that the others end too; when every
// serve has returned, it returns that first error. A serve that returns nil, calls
// runtime.Goexit, or returns an error that wraps [net.ErrClosed] because its member
// was closed, ends nobody else.
//
// It fits http.Server.Serve, grpc.Server.Serve (with a func that takes a
// net.Listener) and accept loops written by hand. As those do, it returns a
// non-nil error after the listener was closed: http.ErrServerClosed, or the
// error of Accept.
func (g *Group) Serve(serve func(net.Listener) error) error {
	type end struct {
		l   *Listener
		err error
	}
	ends := make(chan end)
	for _, l := range g.members {
		go func() {
			e := end{l: l}
			defer func() { ends <- e }()
			e.err = serve(l)
		}()
	}
	var first, closed error
	for range g.members {
		e := <-ends
		switch err := e.err; {
		case err == nil:
		case errors.Is(err, net.ErrClosed) && e.l.isClosed():
			closed = err
		case first == nil:
			first = err
			g.Close()
		}
	}
	return cmp.Or(first, closed)
}

// Close closes all members at once: they don't inherit from each other, but other
// members of the address do. If all are closed already its error wraps net.ErrClosed.
func (g *Group) Close() error { return g.a.close(g.members) }

// Info returns what is in force for the group.
func (g *Group) Info() Info { return g.a.info() }

// Stats returns the sums over the members: closed ones keep counting in
// Accepted and Inherited. Queued and Backlog are sums over the sockets of the
// address in this process, those that closed members left to it included.
func (g *Group) Stats() Stats {
	var s Stats
	for _, l := range g.members {
		accepted, inherited := l.counts()
		s.Accepted += accepted
		s.Inherited += inherited
	}
	if len(*g.a.members.Load()) > 0 {
		s.Queued, s.Backlog = queueLengths(g.a.conns())
	}
	return s
}

// registry has every address whose sockets are open, or are being opened.
var registry = struct {
	mu        sync.Mutex // guards addresses; comes before address.mu
	addresses map[place]*address
}{addresses: make(map[place]*address)}

// steeredMost is the most members of an address that a program steers by source or
// load: the slots of its table.
const steeredMost = 1024

// errGone: the address that was found has ended.
var errGone = errors.New("the address is gone")

// open opens n members of an address, with others of this process or the first.
func open(ctx context.Context, network, address string, n int, cfg *config) (*address, []*Listener, error) {
	req, err := resolve(ctx, network, address, cfg)
	if err != nil {
		return nil, nil, err
	}
	if (req.handoff != nil || req.systemd) && req.at.isFile() {
		req.literal = req.at.host // other processes have other directories
	}
	if req.systemd {
		if err := systemd.receive(); err != nil {
			return nil, nil, listenError(network, address, fmt.Errorf("WithSystemd: %w", err))
		}
		req.noKernel = cmp.Or(req.noKernel, systemd.unbalanced(req.at, n))
	}
	for {
		a, err := enter(req, n)
		var members []*Listener
		if err == nil {
			members, err = a.join(ctx, n, req)
		}
		switch {
		case err == nil:
			return a, members, nil
		case err != errGone:
			return nil, nil, listenError(network, address, err)
		}
	}
}

// enter returns the address of a request, with room kept for n more members.
func enter(req *request, n int) (*address, error) {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if a := registry.addresses[req.at]; a != nil && !req.at.isNew() {
		return a, a.reserve(n, req)
	}
	noKernel := req.noKernel
	if req.dispatcher {
		noKernel = errAsked
	}
	if err := req.fits(noKernel); err != nil {
		return nil, err
	}
	a := newAddress(req, noKernel)
	err := a.reserve(n, req)
	if err == nil && !req.at.isNew() {
		registry.addresses[req.at] = a
	}
	return a, err
}

// errAsked is why the kernel doesn't balance if it isn't to.
var errAsked = errors.New("the dispatcher was asked for")

// register puts an address into the registry whose port or name the system has chosen.
func (a *address) register() {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	a.at = a.at.of(a.addr)
	registry.addresses[a.at] = a
}

// unregister takes an address that has ended out of the registry.
func (a *address) unregister() {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if registry.addresses[a.at] == a {
		delete(registry.addresses, a.at)
	}
}

// reserve keeps room for n members of an address, if they fit it. One that has
// ended takes any: they find out, and come back for another.
func (a *address) reserve(n int, req *request) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.ended {
		if err := a.admitsLocked(n, req); err != nil {
			return err
		}
	}
	a.joining += n
	return nil
}

func (a *address) admitsLocked(n int, req *request) error {
	switch {
	case req.handoff != nil && a.handoff == "":
		return fmt.Errorf("WithHandoff(%q): in this process the listeners of this address have no handoff", *req.handoff)
	case req.handoff != nil && *req.handoff != a.handoff:
		return fmt.Errorf("WithHandoff(%q): in this process the listeners of this address hand off by %q", *req.handoff, a.handoff)
	case req.systemd && !a.systemd:
		return errors.New("WithSystemd: in this process the listeners of this address aren't kept by systemd")
	case req.dispatcher && a.d == nil:
		return fmt.Errorf("WithDispatcher: in this process the listeners of this address are balanced by %v", BalancerKernel)
	case req.requireKernel && a.d != nil:
		return fmt.Errorf("WithRequireKernel: %w: in this process the listeners of this address are balanced by the dispatcher", ErrUnsupported)
	case req.pinned != nil && a.d != nil:
		return fmt.Errorf("WithPinnedProgram: %w: in this process the listeners of this address are balanced by the dispatcher", ErrUnsupported)
	case req.pinned != nil && a.steering.byProgram():
		return fmt.Errorf("steering by %v is %w together with WithPinnedProgram: the address has one program", a.steering, ErrUnsupported)
	case req.steering != a.steering:
		return fmt.Errorf("steering by %v: in this process the listeners of this address are steered by %v", req.steering, a.steering)
	}
	if has, limit := len(*a.members.Load())+a.joining, a.limit(); has+n > limit {
		return fmt.Errorf("%w: it has %d members, %d more are asked for, the limit is %d", ErrGroupFull, has, n, limit)
	}
	return nil
}

// limit is the most members of an address. Members adopt the sockets of closed ones
// first, so there are never more sockets (of one family, where a member has two)
// than there were members.
func (a *address) limit() int {
	limit := maxMembers
	if a.d == nil {
		limit = system.groupLimit
		if a.steering.byProgram() {
			limit = min(limit, steeredMost)
		}
	}
	return limit
}
