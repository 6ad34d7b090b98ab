package lblisten

// Groups: which listeners belong together (the registry), how a member joins
// and leaves, and how connections of a shared socket are dispatched to the
// members that wait. What becomes of a closing member's sockets is in
// inherit.go; what an option of a socket means, in sockopt_*.go.
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
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
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

// place is one address, however it was spelled.
type place struct {
	network string // "tcp4", "tcp6", "tcp" for a dual-stack wildcard, "unix", "unixpacket"
	host    string // a literal address with its zone, or a path
	port    int
}

// isNew tells whether the system is to choose the port or the name.
func (p place) isNew() bool {
	return p.port == 0 && p.network != "unix" && p.network != "unixpacket" || p.host == ""
}

// String is what to ask of package net.
func (p place) String() string {
	if p.network == "unix" || p.network == "unixpacket" {
		return p.host
	}
	return net.JoinHostPort(p.host, strconv.Itoa(p.port))
}

// isFile tells whether an address is a unix socket with a file.
func isFile(at place) bool {
	return (at.network == "unix" || at.network == "unixpacket") && at.host != "" && at.host[0] != '@'
}

// registry has every group whose sockets are open.
var registry = struct {
	mu     sync.Mutex
	groups map[place]*group
}{groups: make(map[place]*group)}

var errProbe = errors.New("the probe ends before bind")

// resolve finds out what package net makes of an address, and whether the
// kernel can balance there: nil, or the reason why it can't. Package net itself
// is asked, by listening with a Control hook that sees the address and the
// socket and then refuses: so an address means here what it means there, and a
// bad one gets net's error.
func resolve(ctx context.Context, network, address string) (at place, noKernel error, err error) {
	var family, literal string
	probe := net.ListenConfig{Control: func(n, a string, c syscall.RawConn) error {
		family, literal = n, a
		if n != "tcp4" && n != "tcp6" {
			noKernel = errors.New("the kernel balances TCP only")
			return errProbe
		}
		noKernel = errProbe // in case Control doesn't run
		if err := c.Control(func(fd uintptr) { noKernel = joinKernelGroup(fd) }); err != nil {
			return err
		}
		return errProbe
	}}
	probe.SetMultipathTCP(false)
	switch runtime.GOOS {
	case "plan9", "js", "wasip1": // package net calls no Control
		a, err := net.ResolveTCPAddr(network, address)
		if err != nil {
			return at, nil, listenError(network, address, err)
		}
		family, literal, noKernel = "tcp6", a.String(), joinKernelGroup(0)
		if a.IP.To4() != nil {
			family = "tcp4"
		}
	default:
		ln, err := probe.Listen(ctx, network, address)
		if err == nil {
			ln.Close()
			err = errors.New("package net called no Control")
		}
		if !errors.Is(err, errProbe) {
			return at, nil, err
		}
	}
	if family != "tcp4" && family != "tcp6" {
		return place{network: family, host: literal}, noKernel, nil
	}

	host, port, err := net.SplitHostPort(literal)
	if err != nil {
		return at, nil, listenError(network, address, err)
	}
	at = place{network: family, host: spellZone(host)}
	if at.port, err = strconv.Atoi(port); err != nil {
		return at, nil, listenError(network, address, err)
	}
	if host == "" || host == "0.0.0.0" || host == "::" {
		at.host = map[string]string{"tcp4": "0.0.0.0", "tcp6": "::"}[family]
		if network == "tcp" && family == "tcp6" && runtime.GOOS != "dragonfly" && runtime.GOOS != "openbsd" {
			at.network = "tcp" // dual-stack; DragonFly and OpenBSD have no such socket
		}
	}
	return at, noKernel, nil
}

// spellZone spells the zone of an address as Addr does: none but that of a
// link-local address, where it counts, and that by name.
func spellZone(host string) string {
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Zone() == "" {
		return host
	}
	if !ip.IsLinkLocalUnicast() {
		return ip.WithZone("").String()
	}
	if n, err := strconv.Atoi(ip.Zone()); err == nil {
		if ifi, err := net.InterfaceByIndex(n); err == nil {
			return ip.WithZone(ifi.Name).String()
		}
	}
	return host
}

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

// explain adds to an EADDRINUSE what is behind it and what to do.
func (g *group) explain(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || !isAddrInUse(err) {
		return err
	}
	hint := "a listener that is not balanced, or another user's, has the address: let it use WithLB too, or choose another address"
	switch {
	case g.at.network == "unix" || g.at.network == "unixpacket":
		hint = "another process listens there, or left its socket file: remove the file if nobody does"
	case g.d != nil:
		hint = fmt.Sprintf("another listener has the address, and it can't be shared between processes without WithHandoff (%v): let both use it with the same path, end that one, or choose another address", g.noKernel)
	}
	if g.h != nil {
		if why := g.h.state(g.at); why != nil {
			hint += "; " + why.Error()
		}
	}
	explained := *op
	explained.Err = &hintedError{op.Err, hint}
	return &explained
}

// hintedError adds what to do to an error.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() + " (" + e.hint + ")" }
func (e *hintedError) Unwrap() error { return e.err }

// log is silent without a logger.
func log(l *slog.Logger, msg string, args ...any) {
	if l != nil {
		l.Info("lblisten: "+msg, args...)
	}
}

func (g *group) info() Info {
	members := len(*g.members.Load())
	i := Info{Balancer: BalancerKernel, Steering: g.steering, Members: members, Reason: g.noKernel}
	if members == 0 {
		return Info{Reason: net.ErrClosed}
	}
	if members > 1 {
		i.OnClose = InheritProcess
	}
	var alone error
	if g.h != nil {
		if alone = g.h.state(g.at); alone == nil {
			i.OnClose |= InheritHandoff
			i.OnKill |= InheritHandoff
		}
	}
	if g.d != nil {
		i.Balancer, i.Sockets = BalancerDispatcher, 1
		if alone != nil {
			i.Reason = inOneLine(g.noKernel, alone)
		}
		return i
	}
	i.Sockets = len(g.conns())
	g.mu.Lock()
	steering, unsteered, wont := g.k.inForce()
	wont = cmp.Or(wont, g.wont)
	g.mu.Unlock()
	i.Steering = steering
	inherits, why := kernelInherits(wont)
	if inherits {
		i.OnClose |= InheritKernel
		i.OnKill |= InheritKernel
	}
	i.Reason = inOneLine(unsteered, why, alone)
	return i
}

// inOneLine joins errors as errors.Join does, for a line of a log.
func inOneLine(errs ...error) (all error) {
	for _, err := range errs {
		switch {
		case all == nil:
			all = err
		case err != nil:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// conns returns all sockets of the group.
func (g *group) conns() []syscall.RawConn {
	if g.d != nil {
		return g.d.conns()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var cs []syscall.RawConn
	for _, l := range *g.members.Load() {
		for _, s := range l.socks {
			cs = append(cs, s.conn)
		}
	}
	for _, w := range *g.shared.Load() {
		cs = append(cs, w.s.conn)
	}
	return cs
}

// queueLengths sums queueLength over sockets; -1 if one doesn't tell.
func queueLengths(conns []syscall.RawConn) (queued, backlog int) {
	if len(conns) == 0 {
		return -1, -1
	}
	for _, c := range conns {
		q, b := -1, -1
		if err := c.Control(func(fd uintptr) { q, b = queueLength(fd) }); err != nil || q < 0 {
			return -1, -1
		}
		queued, backlog = queued+q, backlog+b
	}
	return queued, backlog
}

// A socket is one listening socket of the kernel's group.
type socket struct {
	ln   *net.TCPListener
	conn syscall.RawConn
	net  string       // what package net was asked for: "tcp", "tcp4", "tcp6"
	slot atomic.Int32 // in the table of the steering program, plus 1

	pooled   *pooled            // its place in the handoff's pool, nil without one
	received bool               // it was opened by another process
	restore  func(*net.TCPConn) // what its connections need, nil if nothing
}

// keepAliveOf returns the keep-alive that package net gives to the connections of
// a listener of lc.
func keepAliveOf(lc net.ListenConfig) net.KeepAliveConfig {
	if lc.KeepAliveConfig.Enable || lc.KeepAlive < 0 {
		return lc.KeepAliveConfig
	}
	return net.KeepAliveConfig{Enable: true, Idle: lc.KeepAlive}
}

// restoreKeepAlive returns what gives a connection the keep-alive of lc, if the
// listener was made by net.FileListener, which knows no ListenConfig and gives it
// the default. It returns nil if that is what lc asks for.
func restoreKeepAlive(lc net.ListenConfig) func(*net.TCPConn) {
	switch config := keepAliveOf(lc); config {
	case keepAliveOf(net.ListenConfig{}):
		return nil
	default:
		return func(c *net.TCPConn) {
			if config.Enable {
				c.SetKeepAliveConfig(config)
			} else {
				c.SetKeepAlive(false)
			}
		}
	}
}

// seat returns the sockets of a new member: those that closed members left,
// else new ones.
func (g *group) seat(ctx context.Context, cfg *config) ([]*socket, error) {
	var socks []*socket
	for _, at := range g.at.split() {
		s := g.adopt(ctx, at.network)
		if s == nil {
			var err error
			if s, err = g.openSocket(ctx, at, cfg); err != nil {
				g.mu.Lock()
				g.share(socks)
				g.mu.Unlock()
				return nil, err
			}
		} else {
			log(cfg.log, "a new member adopted the socket of a closed one", "address", g.at)
			if s.received {
				s.restore = restoreKeepAlive(cfg.lc)
			} else {
				s.conn.Control(func(fd uintptr) { adoptKeepAlive(fd, cfg.lc) })
			}
			if cfg.backlogSet {
				if err := setBacklog(s.ln, cfg.backlog); err != nil {
					g.mu.Lock()
					g.share(append(socks, s))
					g.mu.Unlock()
					return nil, err
				}
			}
		}
		socks = append(socks, s)
	}
	return socks, nil
}

// openSeat opens the first sockets of a group, whose port may not be known yet.
func (g *group) openSeat(ctx context.Context, cfg *config) ([]*socket, error) {
	const tries = 16 // a port that is free for IPv4 can be taken for IPv6
	for try := 1; ; try++ {
		var socks []*socket
		var err error
		port := g.at.port
		for _, at := range g.at.split() {
			at.port = port
			var s *socket
			if s, err = g.openSocket(ctx, at, cfg); err != nil {
				break
			}
			port = s.ln.Addr().(*net.TCPAddr).Port
			socks = append(socks, s)
		}
		if err == nil {
			return socks, nil
		}
		for _, s := range socks {
			s.ln.Close()
			g.withdraw(s)
		}
		if len(socks) == 0 || !g.at.isNew() || !isAddrInUse(err) || try == tries {
			return nil, err
		}
	}
}

// withdraw takes a socket that nobody was told of out of the handoff's pool.
func (g *group) withdraw(s *socket) {
	if s.pooled != nil {
		g.h.withdraw(s.pooled)
	}
}

// split returns the addresses of a member's sockets: two, where a dual-stack
// socket would not be balanced.
func (p place) split() []place {
	if splitDualStack && p.network == "tcp" {
		return []place{{"tcp4", "0.0.0.0", p.port}, {"tcp6", "::", p.port}}
	}
	return []place{p}
}

// openSocket opens a socket of the kernel's group.
func (g *group) openSocket(ctx context.Context, at place, cfg *config) (*socket, error) {
	lc, setKeepAlive := lean(cfg.lc)
	lc.SetMultipathTCP(false)
	held := false
	var p *pooled
	lc.Control = chainControl(lc.Control, func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			setKeepAlive(fd)
			err = joinKernelGroup(fd)
		}); cerr != nil || err != nil {
			return cmp.Or(err, cerr)
		}
		if g.h != nil {
			if p, err = g.h.deposit(ctx, c, g, at); err != nil {
				return err
			}
		}
		if cerr := c.Control(func(fd uintptr) {
			held = true
			err = g.k.control(fd)
		}); cerr != nil {
			return cerr
		}
		return err
	})
	network := g.network // so that errors name what was asked for
	if at.network != g.at.network {
		network = at.network // one of two, see split
	}
	ln, err := lc.Listen(ctx, network, at.String())
	var s *socket
	if err == nil {
		s = &socket{ln: ln.(*net.TCPListener), net: at.network, pooled: p}
		s.conn, err = s.ln.SyscallConn() // fails for a nil listener only
	}
	if err == nil && cfg.backlogSet {
		if err = setBacklog(ln, cfg.backlog); err != nil {
			ln.Close()
			s = nil
		}
	}
	if held {
		g.k.opened(s) // only what stays open has a place in the kernel's order
	}
	if p != nil && err != nil {
		g.h.withdraw(p)
	}
	return s, err
}

// The dispatcher: members without sockets of their own. Their Accepts take
// turns at accepting from the one shared listener (leader and followers). An
// Accept first stands in line as a waiter of its member; if nobody leads, it
// leads. The leader accepts, and gives each connection to the member whose turn
// it is, of those that have a waiter, which is always itself if nobody else
// waits; when that is itself, it leaves, and a waiter becomes the leader. So
// nothing is accepted that nobody waits for.
//
// A waiter is either in its member's line, or exactly one message is on its way
// to it: who takes it out of the line, under the member's lock, sends one.
type dispatcher struct {
	g         *group
	ln        net.Listener
	deadliner interface{ SetDeadline(time.Time) error } // ln, if its Accept can be woken
	isTCP     bool                                      // it accepts *net.TCPConn
	pooled    *pooled                                   // its place in the handoff's pool, if this process made it
	restore   func(*net.TCPConn)                        // what its connections need, nil if nothing

	leading atomic.Bool   // somebody has the lead, or it is being passed on
	leader  *waiter       // of a leader that stands alone; belongs to who leads
	seq     atomic.Uint64 // orders waiters, for SteerLoad
	holding atomic.Int32  // connections in all Listener.held
	loose   atomic.Int32  // len(free)

	wakeMu sync.Mutex   // held over ln's SetDeadline
	woken  atomic.Bool  // ln has, or is about to get, a past deadline, which the leader takes back
	isNets bool         // ln's SetDeadline is known not to block
	failed atomic.Value // of a struct{ error }: ln ended for good

	mu     sync.Mutex
	free   []net.Conn  // in hand, for whoever asks next; guarded by mu
	retry  *time.Timer // offers the lead to a waiter after a passing error; guarded by mu
	closed bool        // guarded by mu
}

// A waiter is an Accept that waits for the dispatcher.
type waiter struct {
	message chan message // holds one
	leads   bool         // it is in the listener's Accept; guarded by its member's mu
	since   uint64       // orders it by how long it has waited, see dispatcher.seq; never 0
}

// A message ends the waiting: a connection, an error, or the lead.
type message struct {
	c    net.Conn
	err  error
	lead bool
	rest bool // err is a passing one of the listener, which is left alone for now
}

var waiters = sync.Pool{New: func() any { return &waiter{message: make(chan message, 1)} }}

// A heldConn waits for a busy member, with SteerSource.
type heldConn struct {
	c     net.Conn
	key   uint64
	timer *time.Timer
}

const (
	holdTime = 100 * time.Millisecond
	holdMost = 16
)

// open opens the dispatcher's socket. With a handoff it is the one of all
// processes: whoever is first makes it.
func (d *dispatcher) open(ctx context.Context, cfg *config) error {
	const patience = time.Second // for who is making it at this moment
	g := d.g
	for begin := time.Now(); ; {
		if g.h != nil && !g.at.isNew() {
			ln, err := g.h.find(g)
			if err != nil {
				return err
			}
			if ln != nil {
				d.restore = restoreKeepAlive(g.lc)
				d.use(ln)
				return nil
			}
		}
		err := d.openSocket(ctx, cfg)
		if err == nil || g.h == nil || !isAddrInUse(err) || time.Since(begin) >= patience {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *dispatcher) openSocket(ctx context.Context, cfg *config) error {
	lc, setKeepAlive := lean(cfg.lc)
	lc.SetMultipathTCP(false)
	lc.Control = chainControl(lc.Control, func(network, _ string, c syscall.RawConn) (err error) {
		if network == "tcp4" || network == "tcp6" {
			err = c.Control(setKeepAlive)
		}
		if err == nil && d.g.h != nil {
			d.pooled, err = d.g.h.deposit(ctx, c, d.g, d.g.at)
		}
		return err
	})
	ln, err := lc.Listen(ctx, d.g.network, d.g.ask)
	if err != nil {
		if d.pooled != nil {
			d.g.h.withdraw(d.pooled)
		}
		return err
	}
	d.use(ln)
	return nil
}

// dispatchGroup makes a group of n members on top of ln.
func dispatchGroup(ln net.Listener, n int, cfg *config) (*group, []*Listener) {
	g := newGroup(place{}, ln.Addr().Network(), errors.New("Dispatch was asked for"), cfg)
	g.refs = n
	g.addr = ln.Addr()
	g.d.use(ln)
	close(g.opened)
	members, _ := g.add(context.Background(), n, cfg, nil) // only opening sockets can fail
	return g, members
}

func (d *dispatcher) use(ln net.Listener) {
	d.ln = ln
	if dl, ok := ln.(interface{ SetDeadline(time.Time) error }); ok && dl.SetDeadline(time.Time{}) == nil {
		d.deadliner = dl
	}
	switch ln := ln.(type) { // not by method: a wrapper may hand out connections of its own
	case *net.TCPListener:
		d.isTCP, d.isNets = true, true
	case *net.UnixListener:
		d.isNets = true
	case *Listener:
		d.isTCP = ln.ln != nil || ln.g.d.isTCP
		d.isNets = ln.ln != nil || ln.g.d.isNets
	}
}

func (d *dispatcher) conns() []syscall.RawConn {
	if sc, ok := d.ln.(syscall.Conn); ok {
		if c, err := sc.SyscallConn(); err == nil {
			return []syscall.RawConn{c}
		}
	}
	return nil
}

// acceptDispatched is Accept of a dispatcher's member.
func (l *Listener) acceptDispatched() (net.Conn, error) {
	l.state.Add(1)
	c, err := l.g.d.accept(l)
	l.leave()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	if d := l.g.d; d.restore != nil && d.isTCP {
		d.restore(c.(*net.TCPConn))
	}
	return c, nil
}

func (d *dispatcher) accept(l *Listener) (net.Conn, error) {
	var w *waiter
	leads := false
	for {
		m, inLine := message{}, false
		leads = leads || d.leading.CompareAndSwap(false, true)
		if leads && l.standAlone() {
			d.drop(w)
			w, inLine = d.leader, true
		} else {
			w, m, inLine = l.line(w, leads && d.deadliner != nil)
		}
		if inLine {
			if d.loose.Load() > 0 {
				d.giveFree()
			}
			leads = leads || d.leading.CompareAndSwap(false, true) // who led may have seen nobody in line
			switch {
			case !leads:
				m = <-w.message
			case d.deadliner == nil:
				go d.pump()
				leads = false
				m = <-w.message
			default:
				m = d.lead(l, w)
			}
		}
		if m.lead {
			leads = true
			continue
		}
		d.drop(w)
		switch {
		case leads && m.rest:
			d.rest()
		case leads:
			d.passLead()
		}
		return m.c, m.err
	}
}

// drop ends the use of a waiter that is out of line, with no message on its way.
func (d *dispatcher) drop(w *waiter) {
	if w != nil && w != d.leader {
		waiters.Put(w)
	}
}

// leaderOnly in Listener.since stands for a line of one: the dispatcher's
// leader, which isn't in waiters. It is what most Accepts of a busy server are,
// and takes no lock.
const leaderOnly = 1<<64 - 1

// standAlone puts the leader in the member's line, if nobody is there, and there
// is nothing to look after but connections. Whoever else needs to know the line
// makes an ordinary one of it first, by admit.
func (l *Listener) standAlone() bool {
	d := l.g.d
	if d.deadliner == nil || l.g.steering != SteerFlow || l.mayEnd() || !l.since.CompareAndSwap(0, leaderOnly) {
		return false
	}
	// Before, because from here on somebody may admit it to give it a connection; and
	// again, because who ends the waiting sets why and then admits it.
	return !l.mayEnd() || !l.leaveAlone()
}

// mayEnd tells whether there is something but a connection that ends the waiting.
func (l *Listener) mayEnd() bool {
	return l.state.Load()&closedMark != 0 || l.timed.Load() || l.g.d.failed.Load() != nil
}

// leaveAlone takes a leader that stands alone out of the line. It returns false
// if it doesn't, any more.
func (l *Listener) leaveAlone() bool { return l.since.CompareAndSwap(leaderOnly, 0) }

// admit puts a leader that stands alone in waiters. It is called under l.mu,
// before waiters is used.
func (l *Listener) admit() {
	if l.since.CompareAndSwap(leaderOnly, 1) {
		l.waiters = append(l.waiters, l.g.d.leader)
	}
}

// line puts a waiter in the member's line, or returns the message that makes
// waiting needless. Who was in line before goes to its head again; nil was not.
func (l *Listener) line(w *waiter, leads bool) (_ *waiter, m message, inLine bool) {
	d := l.g.d
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.state.Load()&closedMark != 0:
		return w, message{err: l.opError("accept", net.ErrClosed)}, false
	case l.expired():
		return w, message{err: l.opError("accept", os.ErrDeadlineExceeded)}, false
	case len(l.held) > 0:
		return w, message{c: l.unhold(0).c}, false
	}
	if failed := d.failed.Load(); failed != nil {
		return w, message{err: failed.(struct{ error }).error}, false
	}
	again := w != nil
	if !again {
		w = waiters.Get().(*waiter)
		w.since = 1
		if l.g.steering == SteerLoad {
			w.since = d.seq.Add(1)
		}
	}
	w.leads = leads
	for !l.since.CompareAndSwap(0, w.since) && len(l.waiters) == 0 {
		l.admit()
	}
	at := len(l.waiters)
	if again {
		at = 0
	}
	l.waiters = slices.Insert(l.waiters, at, w)
	l.since.Store(l.waiters[0].since)
	return w, message{}, true
}

// unline takes waiter i out of the line. It is called under l.mu, by who then
// sends the waiter a message, or is its leader.
func (l *Listener) unline(i int) *waiter {
	w := l.waiters[i]
	if len(l.waiters) == 1 {
		l.waiters[0] = nil
		l.waiters = l.waiters[:0]
		l.since.Store(0)
		return w
	}
	l.waiters = slices.Delete(l.waiters, i, i+1)
	l.since.Store(l.waiters[0].since)
	return w
}

// end ends the waiting of waiter i with m. It is called under l.mu.
func (l *Listener) end(i int, m message) {
	w := l.unline(i)
	leads := w.leads // once it has the message, it may be another Accept's
	w.message <- m
	if leads {
		l.g.d.wake()
	}
}

// out takes a leader's own waiter out of line. It returns false if somebody else
// did, and has sent it a message.
func (l *Listener) out(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admit()
	i := slices.Index(l.waiters, w)
	if i >= 0 {
		l.unline(i)
	}
	return i >= 0
}

// send gives m to a waiter of the member; to w itself, which is then true, if
// w is the first choice and still in line. It returns false if nobody waits.
func (l *Listener) send(m message, w *waiter) (sent, own bool) {
	if w != nil && w == l.g.d.leader && l.leaveAlone() {
		return true, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admit()
	if len(l.waiters) == 0 {
		return false, false
	}
	if i := slices.Index(l.waiters, w); i >= 0 {
		l.unline(i)
		return true, true
	}
	// The leader can do it too, but has to be woken.
	i := max(0, slices.IndexFunc(l.waiters, func(w *waiter) bool { return !w.leads }))
	l.end(i, m)
	return true, false
}

// wakeAll ends every waiting of the member with err. It is called under l.mu.
func (l *Listener) wakeAll(err error) {
	l.admit()
	for len(l.waiters) > 0 {
		l.end(0, message{err: err})
	}
}

// setTimer makes a deadline end the waiting. It is called under l.mu.
func (l *Listener) setTimer(t time.Time) {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	switch in := time.Until(t); {
	case t.IsZero():
	case in <= 0:
		l.wakeAll(l.opError("accept", os.ErrDeadlineExceeded))
	default:
		l.timer = time.AfterFunc(in, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			switch {
			case l.expired():
				l.wakeAll(l.opError("accept", os.ErrDeadlineExceeded))
			case !l.deadline.IsZero():
				l.setTimer(l.deadline) // it was put off, or the clock was set back
			}
		})
	}
}

// lead accepts until the waiting of w, which is in line, is over.
func (d *dispatcher) lead(l *Listener, w *waiter) message {
	if !w.leads { // only this goroutine writes it, after it stood in line
		l.mu.Lock()
		w.leads = true
		l.mu.Unlock()
	}
	for {
		select {
		case m := <-w.message:
			return m
		default:
		}
		c, err := d.ln.Accept()
		switch {
		case err == nil:
			switch sent, own := d.route(c, l, w); {
			case own:
				return message{c: c}
			case !sent:
				// Nobody waits, so w is out of line too. What ended its waiting
				// comes second to a connection, unless it is one.
				m := <-w.message
				if m.c == nil {
					return message{c: c}
				}
				d.putFree(c)
				return m
			}
		case d.rested(err):
		case isPassing(err):
			if l.out(w) {
				return message{err: err, rest: true}
			}
		default:
			d.fail(err)
		}
	}
}

// pump leads for waiters where the listener's Accept can't be interrupted. It
// ends when nobody waits.
func (d *dispatcher) pump() {
	for d.anyWaits() {
		c, err := d.ln.Accept()
		switch {
		case err == nil:
			if sent, _ := d.route(c, nil, nil); !sent {
				d.putFree(c)
			}
		case isPassing(err):
			d.sendAny(message{err: err})
			d.rest()
			return
		default:
			d.fail(err)
			return
		}
	}
	d.passLead()
}

// passLead is called by who has the lead, to give it to a waiter, if there is
// one.
func (d *dispatcher) passLead() {
	for {
		d.leading.Store(false)
		if !d.anyWaits() || !d.leading.CompareAndSwap(false, true) {
			return // whoever stands in line later, looks for a leader after that
		}
		switch {
		case d.deadliner == nil:
			go d.pump()
			return
		case d.sendAny(message{lead: true}):
			return
		}
	}
}

// rest gives up the lead after an error that may pass. The next Accept that
// asks leads; those that wait already wait on, for retryAfter at most.
func (d *dispatcher) rest() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leading.Store(false)
	if d.retry == nil && !d.closed {
		d.retry = time.AfterFunc(d.g.retryAfter, func() {
			d.mu.Lock()
			d.retry = nil
			d.mu.Unlock()
			if d.anyWaits() && d.leading.CompareAndSwap(false, true) {
				d.passLead()
			}
		})
	}
}

// wake ends the leader's Accept, which then looks for its message. The leader
// takes the deadline back (rested): would anybody else, it might not wake. It is
// called under a member's mu.
func (d *dispatcher) wake() {
	d.woken.Store(true)
	if d.isNets {
		d.setPast()
	} else {
		go d.setPast() // who knows what it waits for
	}
}

func (d *dispatcher) setPast() {
	d.wakeMu.Lock()
	defer d.wakeMu.Unlock()
	if d.woken.Load() {
		d.deadliner.SetDeadline(longAgo)
	}
}

// rested tells whether an error is that of a wake-up, and takes the deadline
// back.
func (d *dispatcher) rested(err error) bool {
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		return false
	}
	d.wakeMu.Lock()
	defer d.wakeMu.Unlock()
	woken := d.woken.Swap(false)
	if woken {
		d.deadliner.SetDeadline(time.Time{})
	}
	return woken
}

// fail ends all members' waiting, now and later: the listener is no more.
func (d *dispatcher) fail(err error) {
	d.failed.Store(struct{ error }{err})
	for _, l := range *d.g.members.Load() {
		l.mu.Lock()
		l.wakeAll(err)
		l.mu.Unlock()
	}
}

func (d *dispatcher) anyWaits() bool {
	for _, l := range *d.g.members.Load() {
		if l.since.Load() != 0 {
			return true
		}
	}
	return false
}

// sendAny gives m to any waiter, and returns false if there is none.
func (d *dispatcher) sendAny(m message) bool {
	members := *d.g.members.Load()
	turn := int(d.g.turn.Add(1) % maxMembers)
	for i := range members {
		l := members[(turn+i)%len(members)]
		if l.since.Load() == 0 {
			continue
		}
		if sent, _ := l.send(m, nil); sent {
			return true
		}
	}
	return false
}

// route gives a connection to the waiting member whose turn it is, or holds it
// for the one that steering by source wants. When that is l, and its waiter w is
// in line, own is true. Nothing is sent if nobody waits.
func (d *dispatcher) route(c net.Conn, l *Listener, w *waiter) (sent, own bool) {
	if l != nil && d.g.steering != SteerSource && d.waitsAlone(l) {
		if sent, own := l.send(message{c: c}, w); sent {
			return sent, own
		}
	}
	key := d.key(c)
	if d.g.steering == SteerSource && d.hold(c, key) {
		return true, false
	}
	return d.give(c, key, l, w)
}

// waitsAlone tells whether no other member waits, so that there is no choice.
func (d *dispatcher) waitsAlone(l *Listener) bool {
	for _, other := range *d.g.members.Load() {
		if other != l && other.since.Load() != 0 {
			return false
		}
	}
	return true
}

func (d *dispatcher) key(c net.Conn) uint64 {
	switch d.g.steering {
	case SteerSource:
		return sourceKey(c)
	case SteerLoad:
		return 0
	}
	return flowKey(c)
}

// give is route without holding.
func (d *dispatcher) give(c net.Conn, key uint64, l *Listener, w *waiter) (sent, own bool) {
	for {
		members := *d.g.members.Load()
		var first int
		if d.g.steering == SteerLoad {
			first = longestWaiting(members)
		} else {
			first = firstInRank(key, len(members),
				func(i int) uint64 { return members[i].id },
				func(i int) bool { return members[i].since.Load() != 0 })
		}
		if first < 0 {
			return false, false
		}
		m := message{c: c}
		if members[first] != l {
			sent, _ = members[first].send(m, nil)
		} else {
			sent, own = l.send(m, w)
		}
		if sent {
			return sent, own
		}
	}
}

func longestWaiting(members []*Listener) int {
	first, longest := -1, uint64(0)
	for i, l := range members {
		if since := l.since.Load(); since != 0 && (first < 0 || since < longest) {
			first, longest = i, since
		}
	}
	return first
}

// hold keeps a connection for the member that is first in rank for it, if that
// is busy, and not too many are kept already.
func (d *dispatcher) hold(c net.Conn, key uint64) bool {
	members := *d.g.members.Load()
	first := firstInRank(key, len(members), func(i int) uint64 { return members[i].id }, func(int) bool { return true })
	if first < 0 {
		return false
	}
	l := members[first]
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiters) > 0 || l.state.Load()&closedMark != 0 {
		return false
	}
	if d.holding.Add(1) > holdMost {
		d.holding.Add(-1)
		return false
	}
	h := &heldConn{c: c, key: key}
	h.timer = time.AfterFunc(holdTime, func() {
		l.mu.Lock()
		i := slices.Index(l.held, h)
		if i >= 0 {
			l.unhold(i)
		}
		l.mu.Unlock()
		if i >= 0 {
			d.settle(h)
		}
	})
	l.held = append(l.held, h)
	return true
}

// unhold takes a held connection from the member. It is called under l.mu.
func (l *Listener) unhold(i int) *heldConn {
	h := l.held[i]
	l.held = slices.Delete(l.held, i, i+1)
	h.timer.Stop()
	l.g.d.holding.Add(-1)
	return h
}

// settle gives a connection that was held to the next in rank.
func (d *dispatcher) settle(h *heldConn) {
	if sent, _ := d.give(h.c, h.key, nil, nil); !sent {
		d.putFree(h.c)
	}
}

// moveHeld settles what was held for a closed member.
func (d *dispatcher) moveHeld(l *Listener) {
	for {
		l.mu.Lock()
		if len(l.held) == 0 {
			l.mu.Unlock()
			return
		}
		h := l.unhold(0)
		l.mu.Unlock()
		d.settle(h)
	}
}

// putFree keeps a connection for whoever asks next, and closes it if nobody can.
func (d *dispatcher) putFree(c net.Conn) {
	d.mu.Lock()
	closed := d.closed
	if !closed {
		d.free = append(d.free, c)
		d.loose.Add(1)
	}
	d.mu.Unlock()
	if closed {
		c.Close()
		return
	}
	if d.anyWaits() {
		d.giveFree()
	}
}

// giveFree gives the free connections to waiters.
func (d *dispatcher) giveFree() {
	for {
		d.mu.Lock()
		if len(d.free) == 0 {
			d.mu.Unlock()
			return
		}
		c := d.free[0]
		d.free = d.free[1:]
		d.loose.Add(-1)
		d.mu.Unlock()
		if sent, _ := d.give(c, d.key(c), nil, nil); !sent {
			d.putFree(c)
			return
		}
	}
}

// shutdown closes the listener, and what nobody can take any more. The file of a
// unix socket stays if others accept from it.
func (d *dispatcher) shutdown(others bool) error {
	d.mu.Lock()
	d.closed = true
	free := d.free
	d.free = nil
	if d.retry != nil {
		d.retry.Stop()
	}
	d.mu.Unlock()
	for _, c := range free {
		c.Close()
	}
	if d.ln == nil {
		return nil // it was never opened
	}
	if u, ok := d.ln.(interface{ SetUnlinkOnClose(bool) }); ok && d.g.h != nil {
		u.SetUnlinkOnClose(!others)
	}
	return d.ln.Close()
}

// isTemporary is what an error says of itself.
func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}
