package lblisten

// Groups: which listeners belong together (the registry), how a member joins
// and leaves. What an address is, is in place.go; how sockets are opened, in
// socket.go; what becomes of a closing member's, in inherit.go; the dispatcher is in
// dispatch.go.
//
// Locks are taken in the order registry.mu, group.mu, Listener.mu,
// dispatcher.mu, and none is held over a call that waits for somebody.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/cpu"
)

// A Group is n members of one address that were opened together. Other
// listeners of the address in this process belong to the same kernel or
// dispatcher group; Close doesn't close them.
type Group struct {
	g       *group
	members []*Listener
}

// Listeners returns the members, which may be used and closed one by one. The
// slice is the caller's.
func (g *Group) Listeners() []*Listener { return append([]*Listener(nil), g.members...) }

// Addr returns the address that all members share.
func (g *Group) Addr() net.Addr { return g.g.addr }

// Serve runs serve on every member, each in a goroutine of its own. At the
// first error it closes the group, so that the others end too; when every
// serve has returned, it returns that first error. A serve that returns nil, or
// an error around [net.ErrClosed] because its member was closed, ends nobody else.
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
		go func() { ends <- end{l, serve(l)} }()
	}
	var first, closed error
	for range g.members {
		e := <-ends
		switch err := e.err; {
		case err == nil:
		case errors.Is(err, net.ErrClosed) && e.l.state.Load()&closedMark != 0:
			closed = err
		case first == nil:
			first = err
			g.Close()
		}
	}
	return cmp.Or(first, closed)
}

// Close closes all members at once: they don't inherit from each other.
// Members that others opened on the address do. A group whose members are all
// closed already returns what net's second Close does.
func (g *Group) Close() error { return g.g.close(g.members) }

// Info returns what is in force for the group.
func (g *Group) Info() Info { return g.g.info() }

// Stats returns the sums over the members: closed ones keep counting in
// Accepted and Inherited. Queued and Backlog are sums over the sockets of the
// group in this process, those that closed members left to it included.
func (g *Group) Stats() Stats {
	var s Stats
	for _, l := range g.members {
		accepted, inherited := l.counts()
		s.Accepted += accepted
		s.Inherited += inherited
	}
	if len(*g.g.members.Load()) > 0 {
		s.Queued, s.Backlog = queueLengths(g.g.conns())
	}
	return s
}

// group is all members of one address in this process.
type group struct {
	at       place  // the key in the registry
	ask      string // what to ask of package net: at, but the path of a unix socket as it was spelled
	addr     net.Addr
	network  string
	steering Steering
	noKernel error            // why the kernel doesn't balance; nil if it does
	d        *dispatcher      // nil if the kernel balances
	k        *kernelSteering  // nil if the dispatcher balances
	pinned   bool             // a pinned program is in force; guarded by mu
	log      *slog.Logger     // of the member that opened it
	lc       net.ListenConfig // of the same
	handoff  string           // the path of the handoff, "" for none
	h        *handoff         // nil for none; set before opened is closed

	retryAfter time.Duration // see there
	opened     chan struct{} // closed when the first socket is open, or can't be
	failed     bool          // it can't; set before opened is closed
	gone       chan struct{} // closed when all sockets are closed

	_ cpu.CacheLinePad
	// ready counts the watched sockets on which connections wait. Every Accept
	// reads it, it is written only when a watched socket changes.
	ready atomic.Int32
	_     cpu.CacheLinePad
	turn  atomic.Uint32 // where the next look at members or watched sockets begins

	mu     sync.Mutex
	refs   int    // members, and members that are being opened
	dying  bool   // refs was 0: nobody can join any more
	lastID uint64 // of a member, for rendezvous hashing
	wont   error  // why the kernel doesn't inherit
	undo   func() // gives back what letKernelInherit holds
	again  func() // ends looking again
	// Copied when they change, under mu; read without it.
	members atomic.Pointer[[]*Listener]
	shared  atomic.Pointer[[]*watch] // sockets of closed members
}

// registry has every group whose sockets are open.
var registry = struct {
	mu     sync.Mutex
	groups map[place]*group
}{groups: make(map[place]*group)}

// errGone: the group that was found is closing, or never had a socket.
var errGone = errors.New("the group is gone")

// join opens n members of an address, in its group or in a new one.
func join(ctx context.Context, network, address string, n int, cfg *config) (*group, []*Listener, error) {
	at, noKernel, err := resolve(ctx, network, address)
	if err != nil {
		return nil, nil, err
	}
	ask := at.String()
	if isFile(at) { // the directory may change, and other processes have theirs
		if at.host, err = filepath.Abs(at.host); err != nil {
			return nil, nil, listenError(network, address, err)
		}
		if cfg.handoffSet {
			ask = at.host
		}
	}
	for {
		g, first, err := enter(at, network, noKernel, n, cfg)
		var members []*Listener
		switch {
		case err != nil:
		case first:
			g.ask = ask
			members, err = g.open(ctx, n, cfg)
		default:
			members, err = g.add(ctx, n, cfg, nil)
		}
		if err == nil {
			return g, members, nil
		}
		if err != errGone {
			return nil, nil, listenError(network, address, err)
		}
		select {
		case <-g.gone:
		case <-ctx.Done():
			return nil, nil, listenError(network, address, ctx.Err())
		}
	}
}

// enter returns the group of a place with room kept for n more members, and
// whether it is new and has no socket yet.
func enter(at place, network string, noKernel error, n int, cfg *config) (g *group, isNew bool, err error) {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if !at.isNew() {
		if g := registry.groups[at]; g != nil {
			return g, false, g.reserve(n, cfg)
		}
	}
	switch {
	case cfg.dispatcher:
		noKernel = errors.New("the dispatcher was asked for")
	case noKernel != nil && cfg.pinnedSet:
		return nil, false, fmt.Errorf("WithPinnedProgram: %w: %w", ErrUnsupported, noKernel)
	case noKernel != nil && cfg.requireKernel:
		return nil, false, fmt.Errorf("balancing by the kernel is %w: %w", ErrUnsupported, noKernel)
	case noKernel == nil && cfg.handoffSet && cfg.steering == SteerLoad:
		return nil, false, fmt.Errorf("WithHandoff: steering by load is %w together with it, but by the dispatcher: its program would starve the other processes", ErrUnsupported)
	case noKernel == nil && kernelSteers(cfg.steering) != nil:
		return nil, false, fmt.Errorf("steering by %v: %w", cfg.steering, kernelSteers(cfg.steering))
	}
	if noKernel != nil {
		if err := canDispatch(cfg.steering, network); err != nil {
			return nil, false, err
		}
	}
	g = newGroup(at, network, noKernel, cfg)
	if err := g.reserve(n, cfg); err != nil {
		return nil, false, err
	}
	if !at.isNew() {
		registry.groups[at] = g
	}
	return g, true, nil
}

func newGroup(at place, network string, noKernel error, cfg *config) *group {
	g := &group{at: at, network: network, retryAfter: retryAfter, steering: cfg.steering, noKernel: noKernel, pinned: cfg.pinnedSet,
		log: cfg.log, lc: cfg.lc, handoff: cfg.handoff, opened: make(chan struct{}), gone: make(chan struct{})}
	g.members.Store(new([]*Listener))
	g.shared.Store(new([]*watch))
	if noKernel != nil {
		g.d = &dispatcher{g: g, leader: &waiter{message: make(chan message, 1), leads: true, since: 1}}
	}
	return g
}

// reserve keeps room for n members in a group, if they fit it.
func (g *group) reserve(n int, cfg *config) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	limit := maxMembers
	if g.d == nil {
		// Members adopt the sockets of closed ones first, so there are never more
		// sockets (of one family, where a member has two) than there were members.
		limit = groupLimit
		if g.handoff != "" {
			limit = min(limit, handoffSockets)
		}
	}
	switch {
	case g.dying:
		return errGone
	case cfg.handoffSet && g.handoff == "":
		return fmt.Errorf("WithHandoff(%q): in this process the group of this address has no handoff", cfg.handoff)
	case cfg.handoffSet && cfg.handoff != g.handoff:
		return fmt.Errorf("WithHandoff(%q): in this process the group of this address hands off by %q", cfg.handoff, g.handoff)
	case cfg.dispatcher && g.d == nil:
		return fmt.Errorf("WithDispatcher: in this process the group of this address is balanced by %v", BalancerKernel)
	case cfg.requireKernel && g.d != nil:
		return fmt.Errorf("WithRequireKernel: %w: in this process the group of this address is balanced by the dispatcher", ErrUnsupported)
	case cfg.pinnedSet && g.d != nil:
		return fmt.Errorf("WithPinnedProgram: %w: in this process the group of this address is balanced by the dispatcher", ErrUnsupported)
	case cfg.pinnedSet && (g.steering == SteerSource || g.steering == SteerLoad):
		return fmt.Errorf("steering by %v is %w together with WithPinnedProgram: the address has one program", g.steering, ErrUnsupported)
	case cfg.steering != g.steering:
		return fmt.Errorf("steering by %v: in this process the group of this address is steered by %v", cfg.steering, g.steering)
	case g.refs+n > limit:
		return fmt.Errorf("%w: it has %d members, %d more are asked for, the limit is %d", ErrGroupFull, g.refs, n, limit)
	}
	g.refs += n
	return nil
}

// open makes the first socket of a group, and n members.
func (g *group) open(ctx context.Context, n int, cfg *config) ([]*Listener, error) {
	first, err := g.openFirst(ctx, cfg)
	if err != nil {
		err = g.explain(err)
		g.failed = true
		g.mu.Lock()
		g.dying = true
		g.mu.Unlock()
		close(g.opened)
		if g.at.isNew() { // nobody else knows the address
			for _, s := range first {
				g.withdraw(s)
			}
		}
		g.end(first)
		return nil, err
	}
	if g.d != nil {
		g.addr = g.d.ln.Addr()
		log(cfg.log, "the in-process dispatcher balances", "address", g.addr, "reason", g.noKernel)
	} else {
		// Of a split dual-stack member it is the IPv6 one: [::]:port, as net's.
		g.addr = first[len(first)-1].ln.Addr()
	}
	if g.at.isNew() {
		registry.mu.Lock()
		switch a := g.addr.(type) {
		case *net.TCPAddr:
			g.at.port = a.Port
		default:
			g.at.host = a.String()
		}
		registry.groups[g.at] = g
		registry.mu.Unlock()
		if g.h != nil {
			if g.d != nil {
				g.h.bound(g.d.pooled, g.at)
			}
			for _, s := range first {
				g.h.bound(s.pooled, g.at)
			}
			g.h.enter(ctx, g)
		}
	}
	close(g.opened)
	return g.add(ctx, n, cfg, first)
}

// openFirst makes the first socket of a group: the dispatcher's, or those of the
// first member, which it returns, also if there was an error later.
func (g *group) openFirst(ctx context.Context, cfg *config) (first []*socket, err error) {
	if g.handoff != "" {
		if g.h, err = openHandoff(g.handoff, g.log); err != nil {
			return nil, err
		}
		if !g.at.isNew() {
			g.h.enter(ctx, g)
		}
	}
	if g.d != nil {
		return nil, g.d.open(ctx, cfg)
	}
	if g.k, err = newKernelSteering(g, cfg); err != nil {
		return nil, err
	}
	if g.at.isNew() {
		first, err = g.openSeat(ctx, cfg)
	} else {
		first, err = g.seat(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	return first, g.letKernelInherit(first[0], cfg)
}

// add makes n members, for which room is kept. The first gets the sockets that
// are open already, if there are any. When add fails it gives the room back.
func (g *group) add(ctx context.Context, n int, cfg *config, first []*socket) ([]*Listener, error) {
	if first == nil {
		select {
		case <-g.opened:
		case <-ctx.Done():
			g.leave(nil, n)
			return nil, ctx.Err()
		}
	}
	if g.failed {
		return nil, errGone
	}
	members := make([]*Listener, 0, n)
	var err error
	for range n {
		l := &Listener{g: g, log: cfg.log, idle: make(chan struct{})}
		if g.d == nil {
			if first == nil {
				if first, err = g.seat(ctx, cfg); err != nil {
					break
				}
			}
			l.socks, l.ln, l.onAccept = first, first[0].ln, g.k.onAccept()
			if first[0].restore != nil { // never together with steering by load
				l.onAccept = first[0].restore
			}
			if len(first) > 1 {
				l.side = g.watch(first[1], l)
			}
			first = nil
		}
		members = append(members, l)
	}
	switch {
	case err != nil:
	case g.d == nil && cfg.pinnedSet:
		err = g.letKernelInherit(members[0].socks[0], cfg)
	case g.d != nil && cfg.backlogSet:
		err = setBacklog(g.d.ln, cfg.backlog)
	}

	g.mu.Lock()
	for _, l := range members {
		g.lastID++
		l.id = g.lastID
	}
	now := append(append([]*Listener(nil), *g.members.Load()...), members...)
	g.members.Store(&now)
	if g.k != nil {
		g.k.changed()
	}
	g.mu.Unlock()
	for _, l := range members {
		if l.side != nil {
			go l.side.run(false)
		}
	}
	if err != nil {
		g.leave(nil, n-len(members))
		if len(members) > 0 {
			g.close(members)
		}
		return nil, g.explain(err)
	}
	return members, nil
}

// letKernelInherit is letKernelInherit of the system, on a socket of the group,
// and starts to look again where that is needed.
func (g *group) letKernelInherit(s *socket, cfg *config) error {
	var done func()
	var wont, err error
	g.mu.Lock() // a program that steers must not come between
	defer g.mu.Unlock()
	if cerr := s.conn.Control(func(fd uintptr) { done, wont, err = letKernelInherit(fd, cfg.pinned) }); cerr != nil || err != nil {
		return cmp.Or(err, cerr)
	}
	g.wont = wont
	if cfg.pinnedSet {
		g.pinned = true
		g.k.replaced()
	}
	if done != nil {
		g.undo = done
	}
	if g.again == nil {
		g.again = keepLooking(g.lookAgain)
	}
	return nil
}

// forget gives back what letKernelInherit holds, and ends looking again.
func (g *group) forget() {
	g.mu.Lock()
	again, undo := g.again, g.undo
	g.again, g.undo = nil, nil
	g.mu.Unlock()
	for _, end := range []func(){again, undo} {
		if end != nil {
			end()
		}
	}
}

// leave takes members, and room for n that were not made, out of the group.
// With the last one everything is closed; otherwise their sockets are shared
// from here on, and the siblings accept from them.
func (g *group) leave(members []*Listener, n int) error {
	var socks []*socket
	g.mu.Lock()
	for _, l := range members {
		l.left = true
		socks = append(socks, l.socks...)
	}
	var rest []*Listener
	for _, l := range *g.members.Load() {
		if !l.left {
			rest = append(rest, l)
		}
	}
	g.members.Store(&rest)
	g.refs -= len(members) + n
	if g.refs > 0 {
		g.share(socks)
		if len(socks) > 0 { // else who opens the group may be setting k at this moment
			g.k.changed()
		}
		g.mu.Unlock()
		for _, l := range members {
			if l.socks != nil {
				log(l.log, "siblings inherit the socket of a closed member", "address", g.addr, "siblings", len(rest))
			}
		}
		return nil
	}
	g.dying = true
	g.mu.Unlock()
	return g.end(socks)
}

// end closes everything that a group has, socks among it.
func (g *group) end(socks []*socket) (err error) {
	others := false // accept from them
	if g.h != nil {
		others = g.h.leave(g)
	}
	g.mu.Lock()
	shared := *g.shared.Load()
	g.shared.Store(new([]*watch))
	g.mu.Unlock()
	for _, w := range shared {
		w.stop()
		socks = append(socks, w.s)
	}
	for _, s := range socks {
		err = cmp.Or(err, s.ln.Close())
	}
	g.forget()
	if g.k != nil {
		g.k.close()
	}
	if g.d != nil {
		err = g.d.shutdown(others)
	}
	if g.h != nil {
		g.h.close()
	}
	g.unregister()
	close(g.gone)
	return err
}

func (g *group) unregister() {
	registry.mu.Lock()
	if registry.groups[g.at] == g {
		delete(registry.groups, g.at)
	}
	registry.mu.Unlock()
}

// close closes those members that aren't closed yet, without inheritance
// between them. What Close promises is in Listener.Close.
func (g *group) close(members []*Listener) error {
	var closing []*Listener
	for _, l := range members {
		if l.beginClose() {
			closing = append(closing, l)
		}
	}
	if closing == nil {
		return &net.OpError{Op: "close", Net: g.network, Addr: g.addr, Err: net.ErrClosed}
	}
	for _, l := range closing {
		l.awaitIdle()
	}
	err := g.leave(closing, 0)
	if g.d != nil {
		for _, l := range closing {
			g.d.moveHeld(l)
		}
	}
	return err
}
