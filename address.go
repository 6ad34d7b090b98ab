package lblisten

// An address: all that this process has at one place. Here is how members join and
// leave it, and how it begins and ends. How its sockets are opened is in socket.go,
// what becomes of a closed member's in inherit.go.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/cpu"
)

// An address is all members of one place in this process, and their sockets.
//
// Whoever changes which sockets it has, has its turn, and may wait for anything
// meanwhile. Locks are taken in the order turn, registry.mu, address.mu, then those
// of members, watches and the dispatcher, of which none takes another; and no mutex
// is held over a call that waits.
type address struct {
	at        place    // the key in the registry; known when the first socket is open
	addr      net.Addr // nil until then
	network   string   // as whoever opened it spelled it
	steering  Steering
	noKernel  error           // why the kernel doesn't balance; nil if it does
	d         *dispatcher     // nil if the kernel balances
	k         *kernelSteering // nil if the dispatcher balances; set with the turn, before there is a member
	h         *handoff        // nil for none; likewise
	handoff   string          // its path, "" for none
	systemd   bool            // systemd is to keep its sockets
	chosen    bool            // the system has chosen the port, or the name
	bell      func()          // to be called for each connection, nil for nothing; likewise
	keepAlive keepAlive       // what connections of sockets of other processes get
	log       *slog.Logger    // of whoever opened it

	_ cpu.CacheLinePad
	// ready counts the shared sockets in which connections are queued. Every Accept
	// reads it; it is written only when one of them changes.
	ready  atomic.Int32
	_      cpu.CacheLinePad
	begins atomic.Uint32 // where the next look at members or shared sockets begins

	// turn holds one. Whoever opens, adopts, steers, retires or ends the sockets has
	// it, and may wait for anything meanwhile. A Close takes it only if it is the last.
	turn  chan struct{}
	notes []note      // for the log, when the turn is given back; the turn's
	dirty atomic.Bool // members have changed: whoever has the turn steers anew before giving it back

	mu      sync.Mutex // guards what follows; held for instants
	joining int        // members that a Listen is about to make
	ended   bool       // nobody was left, and nobody about to join
	// Copied when they change, under mu; read without it.
	members atomic.Pointer[[]*Listener]
	shared  atomic.Pointer[[]*watch] // sockets that no member owns, and companions
}

func newAddress(req *request, noKernel error) *address {
	a := &address{at: req.at, network: req.network, steering: req.steering, noKernel: noKernel,
		keepAlive: req.keepAlive, log: req.log, systemd: req.systemd, chosen: req.at.isNew(), turn: make(chan struct{}, 1)}
	if req.handoff != nil {
		a.handoff = *req.handoff
	}
	a.members.Store(new([]*Listener))
	a.shared.Store(new([]*watch))
	if noKernel != nil {
		a.d = &dispatcher{a: a}
		a.d.out.L = &a.d.mu
	}
	return a
}

// String returns the network, the address and the balancer.
func (a *address) String() string {
	b := BalancerKernel
	if a.d != nil {
		b = BalancerDispatcher
	}
	return fmt.Sprintf("%s %v (%v)", a.network, a.addr, b)
}

// opError has the form of net's errors for a listener.
func (a *address) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: a.network, Addr: a.addr, Err: err}
}

// takeTurn waits for the turn. As in package net a context that has ended matters
// only where there is something to wait for.
func (a *address) takeTurn(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// giveTurn gives the turn back, when what has changed is steered, and then writes
// the log, whose Handler is the user's.
func (a *address) giveTurn() {
	for again := true; again; {
		if a.dirty.Swap(false) && a.k != nil {
			a.k.settle()
		}
		notes := a.notes
		a.notes = nil
		<-a.turn
		again = a.dirty.Load() && a.tryTurn() // a Close in this moment found it taken
		defer writeNotes(notes)               // also if the one before panics
	}
}

// tryTurn takes the turn if nobody has it.
func (a *address) tryTurn() bool {
	select {
	case a.turn <- struct{}{}:
		return true
	default:
		return false
	}
}

// join makes n members, for which room is kept.
func (a *address) join(ctx context.Context, n int, req *request) (members []*Listener, err error) {
	if err := a.takeTurn(ctx); err != nil {
		if a.joined(n, nil, nil) {
			a.turn <- struct{}{}
			defer a.giveTurn()
			a.end(nil)
		}
		return nil, err
	}
	returned := false
	defer func() {
		if !returned && members != nil { // the logger has ended this goroutine
			a.close(members)
		}
	}()
	err = a.joinNow(ctx, n, req, &members)
	returned = true
	return members, err
}

// joinNow is join for whoever has the turn, which it gives back. A Control hook may
// panic or exit the goroutine: then it is as if it had failed.
func (a *address) joinNow(ctx context.Context, n int, req *request, members *[]*Listener) error {
	defer a.giveTurn()
	if a.hasEnded() {
		a.joined(n, nil, nil)
		return errGone
	}
	var seats []role
	defer func() {
		if *members == nil && a.joined(n, nil, seats) {
			a.end(nil)
		}
	}()
	if err := a.seatAll(ctx, n, req, &seats); err != nil {
		return a.explain(err)
	}
	if a.systemd {
		systemd.confirm()
	}
	var made []*Listener
	for _, s := range seats {
		made = append(made, &Listener{a: a, log: req.log, role: s})
	}
	a.joined(n, made, nil)
	*members = made
	a.dirty.Store(true)
	a.note(req.log, news, "members joined", "address", a.addr, "count", n, "members", len(*a.members.Load()))
	if a.at.isFile() {
		a.dropUnreachable()
	}
	return nil
}

// joined makes members of n for which room was kept, or shares what those have
// that couldn't be made. It returns true if the address has to end, because nobody is
// in it or about to be.
func (a *address) joined(n int, members []*Listener, failed []role) (last bool) {
	for _, s := range failed {
		s.close()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := append(slices.Clone(*a.members.Load()), members...)
	a.members.Store(&now)
	for _, l := range members {
		if o, ok := l.role.(*owner); ok && o.companion != nil {
			a.shareLocked(o.companion)
		}
	}
	for _, s := range failed {
		if o, ok := s.(*owner); ok && o.companion != nil {
			a.shareLocked(o.companion)
		}
		a.shareLocked(s.leaveBehind()...)
	}
	a.joining -= n
	return a.isLeftLocked()
}

// isLeftLocked tells whether the address is nobody's any more, and is to end. It
// is true once.
func (a *address) isLeftLocked() bool {
	left := !a.ended && a.joining == 0 && len(*a.members.Load()) == 0
	a.ended = a.ended || left
	return left
}

func (a *address) hasEnded() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ended
}

// seatAll makes the acceptors of n members, and the first socket if there is none.
// It is called with the turn. Those that it has made until it fails are in seats.
func (a *address) seatAll(ctx context.Context, n int, req *request, seats *[]role) error {
	isFirst := a.addr == nil
	if isFirst {
		if err := a.openFirst(ctx, req, seats); err != nil {
			return err
		}
	} else if a.d != nil {
		if err := a.d.renew(ctx, req); err != nil {
			return err
		}
	}
	for len(*seats) < n {
		if a.d != nil {
			*seats = append(*seats, a.d.join())
			continue
		}
		o, err := a.seat(ctx, req)
		if err != nil {
			return err
		}
		*seats = append(*seats, o)
	}
	switch {
	case req.pinned != nil:
		return a.k.pin((*seats)[0].(*owner).s, *req.pinned)
	case !isFirst && a.d != nil && req.backlog != nil:
		return setBacklog(a.d.source().ln, *req.backlog)
	}
	return nil
}

// openFirst makes the first socket of an address: the dispatcher's, or the first
// owner's, which is then in seats, also if there is an error later.
func (a *address) openFirst(ctx context.Context, req *request, seats *[]role) error {
	isNew := a.at.isNew()
	if err := a.prepare(ctx, req, isNew); err != nil {
		return err
	}
	if a.d != nil {
		if a.d.from == nil {
			if err := a.d.open(ctx, req); err != nil {
				return err
			}
		}
		a.addr = a.d.from.ln.Addr()
		a.note(req.log, routine, "the in-process dispatcher balances", "address", a.addr, "reason", a.noKernel)
	} else {
		makeSeat := a.seat
		if isNew {
			makeSeat = a.openSeat
		}
		o, err := makeSeat(ctx, req)
		if err != nil {
			return err
		}
		*seats = append(*seats, o)
		// Of a split dual-stack member it is the IPv6 one: [::]:port, as net's.
		socks := o.sockets()
		a.addr = socks[len(socks)-1].ln.Addr()
		a.k.begin(o.s, req)
	}
	if isNew {
		a.register()
		if a.h != nil {
			a.h.enter(a)
		}
	}
	return nil
}

// prepare gets an address what it needs before it opens a socket: its steering, the
// handoff, whose sockets are shared from here on, and those that systemd has held.
func (a *address) prepare(ctx context.Context, req *request, isNew bool) error {
	kept, err := a.takeKept()
	defer func() {
		for _, s := range kept {
			s.close()
		}
	}()
	if err != nil {
		return err
	}
	if a.d == nil && a.k == nil {
		if a.k, err = newKernelSteering(a, req, kept); err != nil {
			return err
		}
		a.bell = a.k.bell()
	}
	if a.handoff != "" && a.h == nil {
		enter := func(h *handoff) {
			if !isNew {
				h.enter(a)
			}
		}
		if a.h, err = openHandoff(a.handoff, a.log, a, enter); err != nil {
			return fmt.Errorf("WithHandoff: %w", err)
		}
	}
	for len(kept) > 0 {
		if err := a.useKept(ctx, kept[0], req); err != nil {
			return err
		}
		kept = kept[1:]
	}
	return nil
}

// close closes those members that aren't closed yet, without inheritance
// between them. What Close promises is in Listener.Close.
func (a *address) close(members []*Listener) error {
	var closing []*Listener
	var idle []<-chan struct{}
	for _, l := range members {
		if ch := l.role.close(); ch != nil {
			closing, idle = append(closing, l), append(idle, ch)
		}
	}
	if closing == nil {
		return a.opError("close", net.ErrClosed)
	}
	// That takes no time, but a listener behind Dispatch may not keep what SetDeadline
	// promises, and Close must return.
	late, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	for _, ch := range idle {
		select {
		case <-ch:
		case <-late.Done():
		}
	}
	a.mu.Lock()
	for _, l := range closing {
		l.left = true
	}
	now := slices.DeleteFunc(slices.Clone(*a.members.Load()), func(l *Listener) bool { return l.left })
	a.members.Store(&now)
	last := a.isLeftLocked()
	var own []*watch
	for _, l := range closing {
		own = append(own, l.leaveBehind()...)
	}
	if !last {
		a.shareLocked(own...)
	}
	a.mu.Unlock()
	if last {
		a.turn <- struct{}{}
		defer a.giveTurn()
		return a.end(own)
	}
	a.dirty.Store(true)
	if a.tryTurn() { // otherwise whoever has it steers
		if a.at.isFile() {
			a.dropUnreachable()
		}
		a.giveTurn()
	}
	log(closing[0].log, news, "members left, siblings have their sockets", "address", a.addr, "count", len(closing), "siblings", len(now))
	return nil
}

// end closes everything that an address has, and the sockets of its last members.
// It is called with the turn.
func (a *address) end(own []*watch) (err error) {
	defer a.unregister()
	others := false // accept from its sockets
	if a.h != nil {
		others = a.h.leave(a)
		defer a.h.close()
	}
	stays := func(s *socket) bool { return others && (s.pooled == nil || a.h.mayBeHeld(s)) } // its file
	a.mu.Lock()
	shared := *a.shared.Load()
	a.shared.Store(new([]*watch))
	a.mu.Unlock()
	var socks []*socket
	for _, w := range own {
		socks = append(socks, w.s)
	}
	for _, w := range shared {
		w.stop()
		socks = append(socks, w.s)
	}
	if a.k != nil {
		defer a.k.close()
		a.k.leave(socks)
	}
	for _, s := range socks {
		if !stays(s) {
			s.removeFile(a.at)
		}
		err = cmp.Or(err, s.close())
	}
	if a.d != nil {
		err = cmp.Or(err, a.d.end(stays))
	}
	return err
}

// discard closes a socket that isn't shared any more.
func (a *address) discard(s *socket) {
	a.turn <- struct{}{}
	defer a.giveTurn()
	if a.k == nil {
		s.discard()
		return
	}
	a.k.discard(s)
	a.dirty.Store(true)
}

// sockets returns all sockets of the address.
func (a *address) sockets() []*socket {
	var socks []*socket
	if a.d != nil {
		if s := a.d.source().s; s != nil {
			socks = append(socks, s)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, l := range *a.members.Load() {
		if o, ok := l.role.(*owner); ok {
			socks = append(socks, o.s)
		}
	}
	for _, w := range *a.shared.Load() {
		socks = append(socks, w.s)
	}
	return socks
}

// conns returns all sockets of the address, and what is known of a foreign listener's.
func (a *address) conns() []syscall.RawConn {
	var cs []syscall.RawConn
	if a.d != nil && a.d.source().s == nil {
		cs = a.d.conns()
	}
	for _, s := range a.sockets() {
		cs = append(cs, s.conn)
	}
	return cs
}

// dispatchAddress makes an address of n members on top of ln.
func dispatchAddress(ln net.Listener, addr net.Addr, n int, cfg *config) (*address, []*Listener) {
	req := &request{config: cfg, network: addr.Network()}
	a := newAddress(req, errors.New("Dispatch was asked for"))
	a.addr = addr
	a.d.use(sourceOf(ln, nil, nil)) // which calls the listener, before anybody else can
	a.joining = n
	members, _ := a.join(context.Background(), n, req) // only opening sockets can fail
	return a, members
}
