package lblisten

// A listening socket: how it is opened, adopted, kept alive. Who accepts from it is
// in owner.go, inherit.go and dispatch.go.

import (
	"cmp"
	"context"
	"net"
	"os"
	"syscall"
	"time"
)

// A socket is one listening socket of an address. It never changes: what differs
// between those who accept from it is theirs.
type socket struct {
	ln   socketListener
	conn syscall.RawConn
	fd   uintptr // its number, for a look that does no harm if it is another's by then
	net  string  // what package net was asked for: "tcp", "tcp4", "tcp6", "unix"
	file fileKey // of a unix socket: the file that it was bound to; zero for none

	pooled   *pooled // its place in the handoff's pool, nil without one
	received bool    // another process opened it
	kept     *kept   // what systemd holds of it, nil for nothing; set before anybody else knows the socket, or with the turn
}

// close closes a socket, which systemd goes on holding if it does.
func (s *socket) close() error {
	s.kept.leave()
	return s.ln.Close()
}

// discard closes a socket that nobody needs any more.
func (s *socket) discard() {
	s.kept.remove()
	s.ln.Close()
}

// takeKept returns the sockets that systemd holds of an address that has none yet. It is
// called with the turn, as are useKept and keep.
func (a *address) takeKept() ([]*socket, error) {
	if !a.systemd || a.chosen {
		return nil, nil
	}
	return systemd.take(a.at)
}

// useKept has an address share a socket that systemd has held, or accept from it.
func (a *address) useKept(ctx context.Context, s *socket, req *request) error {
	if a.h != nil {
		switch p, err := a.h.depositKept(ctx, s, a); {
		case err != nil:
			return err
		case p == nil: // it is in the pool, and shared by way of it
			s.close()
			return nil
		default:
			s.pooled = p
		}
	}
	if a.d != nil && a.d.from == nil && s.hasFile(a.at) {
		a.d.use(sourceOf(s.ln, s, finishKeepAlive(req.keepAlive)))
	} else {
		a.inherit(s)
	}
	a.note(req.log, news, "systemd has kept a socket of this address", "address", a.at)
	return nil
}

// keep has systemd hold a socket, if that is asked for.
func (a *address) keep(c syscall.RawConn, file fileKey) (*kept, error) {
	if !a.systemd || a.chosen {
		return nil, nil
	}
	return systemd.keep(c, file)
}

// A socketListener is what package net makes of a socket: *net.TCPListener or
// *net.UnixListener. None of its methods but Accept blocks.
type socketListener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
	File() (*os.File, error)
}

// newSocket makes a socket of what package net has opened.
func newSocket(ln net.Listener, network string, p *pooled) (*socket, error) {
	s := &socket{ln: ln.(socketListener), net: network, pooled: p}
	var err error
	if s.conn, err = s.ln.SyscallConn(); err != nil {
		return nil, err // a nil listener
	}
	s.conn.Control(func(fd uintptr) { s.fd = fd })
	return s, nil
}

// readable tells whether a connection is queued in the socket now.
func (s *socket) readable() bool {
	r := false
	s.conn.Control(func(fd uintptr) { r = readable(fd) })
	return r
}

// A fileKey tells one file from another; the zero one is none.
type fileKey struct{ dev, ino uint64 }

// lookAtFile returns the file of a unix socket's path: none if there is none, or if
// the system can't tell one file from another.
func lookAtFile(at place) fileKey {
	if !at.isFile() {
		return fileKey{}
	}
	return fileKeyAt(at.host)
}

// hasFile tells whether the file of a unix socket's path is still the one that the
// socket was bound to, so that clients reach it. The inode isn't used again while
// the socket is open.
func (s *socket) hasFile(at place) bool {
	return s.file == (fileKey{}) || lookAtFile(at) == s.file
}

// removeFile removes the file of a unix socket, unless it is another's by now, or systemd
// goes on holding the socket.
func (s *socket) removeFile(at place) {
	if s.kept == nil && s.file != (fileKey{}) && s.hasFile(at) {
		os.Remove(at.host)
	}
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

// keepAlive is the keep-alive that connections have.
type keepAlive = net.KeepAliveConfig

// keepAliveAsked returns the keep-alive that package net gives to the connections
// of a listener of lc; set is false if it leaves them alone.
func keepAliveAsked(lc net.ListenConfig) (k keepAlive, set bool) {
	if lc.KeepAliveConfig.Enable || lc.KeepAlive < 0 {
		return lc.KeepAliveConfig, lc.KeepAliveConfig.Enable
	}
	return keepAlive{Enable: true, Idle: lc.KeepAlive}, true
}

// finishKeepAlive returns what gives a connection its keep-alive, if the listener
// was made by net.FileListener, which knows no ListenConfig and gives it the default.
// It returns nil if that is what is wanted.
func finishKeepAlive(k keepAlive) func(net.Conn) {
	const d = 15 * time.Second
	if k.Enable && (k.Idle == 0 || k.Idle == d) && (k.Interval == 0 || k.Interval == d) && (k.Count == 0 || k.Count == 9) {
		return nil
	}
	return giveKeepAlive(k)
}

// giveKeepAlive returns what gives a connection its keep-alive.
func giveKeepAlive(k keepAlive) func(net.Conn) {
	return func(c net.Conn) {
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetKeepAliveConfig(k)
		}
	}
}

// seat makes an owner, of sockets that closed members left, else of new ones. It is
// called with the turn.
func (a *address) seat(ctx context.Context, req *request) (*owner, error) {
	var o *owner
	for _, at := range a.at.split() {
		w, err := a.adoptOrOpen(ctx, at, req)
		if err != nil {
			if o != nil {
				a.share(newWatch(a, o.s, o.finish))
			}
			return nil, err
		}
		o = a.own(o, w)
	}
	return o, nil
}

// own makes an owner of a socket, or gives one a companion.
func (a *address) own(o *owner, w *watch) *owner {
	if o == nil {
		return newOwner(a, w)
	}
	o.companion = w
	w.of.Store(o)
	return o
}

// adoptOrOpen returns a socket for a new member.
func (a *address) adoptOrOpen(ctx context.Context, at place, req *request) (*watch, error) {
	s := a.adopt(ctx, at.network)
	if s == nil {
		s, err := a.openSocket(ctx, at, req)
		if err != nil {
			return nil, err
		}
		return newWatch(a, s, nil), nil
	}
	a.note(req.log, routine, "a new member adopted the socket of a closed one", "address", a.at)
	w := newWatch(a, s, nil)
	if s.kept == nil {
		var err error
		if s.kept, err = a.keep(s.conn, s.file); err != nil {
			a.share(w)
			return nil, err
		}
	}
	if s.received {
		w.finish = finishKeepAlive(req.keepAlive)
	} else {
		s.conn.Control(func(fd uintptr) { w.finish = adoptKeepAlive(fd, req.keepAlive) })
	}
	if req.backlog != nil {
		if err := setBacklog(s.ln, *req.backlog); err != nil {
			a.share(w)
			return nil, err
		}
	}
	return w, nil
}

// openSeat makes the first owner of an address whose port the system chooses.
func (a *address) openSeat(ctx context.Context, req *request) (*owner, error) {
	const tries = 16 // a port that is free for IPv4 can be taken for IPv6
	for try := 1; ; try++ {
		var o *owner
		var err error
		port := a.at.port
		for _, at := range a.at.split() {
			at.port = port
			var s *socket
			if s, err = a.openSocket(ctx, at, req); err != nil {
				break
			}
			port = s.ln.Addr().(*net.TCPAddr).Port
			o = a.own(o, newWatch(a, s, nil))
		}
		switch {
		case err == nil:
			return o, nil
		case o == nil:
			return nil, err
		}
		a.k.discard(o.s)
		a.withdraw(o.s.pooled)
		if !isAddrInUse(err) || try == tries {
			return nil, err
		}
	}
}

// withdraw takes a socket that nobody was told of out of the handoff's pool.
func (a *address) withdraw(p *pooled) {
	if p != nil {
		a.h.withdraw(p)
	}
}

// openSocket opens a socket of the kernel's group.
func (a *address) openSocket(ctx context.Context, at place, req *request) (*socket, error) {
	network, literal := req.network, req.literal
	if at.network != a.at.network {
		network = at.network // one of two, see split
	}
	if at.network != req.at.network || at.port != req.at.port { // or the system has chosen the port
		literal = at.String()
	}
	s, err := a.listen(ctx, network, literal, at, req)
	if err != nil {
		return nil, err
	}
	a.k.add(s)
	return s, nil
}

// listen opens a socket, and deposits it with the handoff if there is one.
func (a *address) listen(ctx context.Context, network, literal string, at place, req *request) (*socket, error) {
	var p *pooled
	var held *kept
	lc, setKeepAlive := lean(req.lc)
	lc.SetMultipathTCP(false)
	lc.Control = chainControl(lc.Control, a.control(ctx, at, setKeepAlive, &p, &held))
	// A Control that panics or exits its goroutine leaves nothing in the pool.
	opened := false
	defer func() {
		if !opened {
			a.withdraw(p)
			held.remove()
		}
	}()
	ln, err := lc.Listen(ctx, network, literal)
	if err != nil && a.systemd && isAddrInUse(err) && systemd.isLeftOver(at) {
		os.Remove(at.host)
		ln, err = lc.Listen(ctx, network, literal)
	}
	if err != nil {
		return nil, err
	}
	s, err := newSocket(ln, at.network, p)
	if err != nil {
		ln.Close()
		return nil, err
	}
	if s.file = lookAtFile(at); s.file != (fileKey{}) {
		if u, ok := ln.(interface{ SetUnlinkOnClose(bool) }); ok {
			u.SetUnlinkOnClose(false) // the file may be another's by then: see removeFile
		}
	}
	if req.backlog != nil {
		err = setBacklog(ln, *req.backlog)
	}
	if err == nil && at.isFile() { // whose name in the store is that of its file
		held, err = a.keep(s.conn, s.file)
	}
	if err != nil {
		s.removeFile(at)
		ln.Close()
		return nil, err
	}
	s.kept = held
	if p != nil {
		a.h.bound(p, a.at.of(ln.Addr()), s.file)
	}
	opened = true
	return s, nil
}

// control returns what is done with a new socket before it is bound: it gets its
// keep-alive, joins the kernel's group, and goes to the others of the handoff and to systemd.
func (a *address) control(ctx context.Context, at place, setKeepAlive func(fd uintptr), p **pooled, held **kept) func(string, string, syscall.RawConn) error {
	return func(family, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			if !at.isUnix() {
				setKeepAlive(fd)
			}
			if a.k == nil {
				return
			}
			if family == "tcp6" && at == a.at {
				a.alignV6Only(fd)
			}
			if err = joinKernelGroup(fd); err == nil {
				err = a.k.control(fd)
			}
		})
		if cerr == nil && err == nil && a.h != nil {
			*p, err = a.h.deposit(ctx, c, a, at)
		}
		if cerr == nil && err == nil && !at.isFile() {
			*held, err = a.keep(c, fileKey{})
		}
		return cmp.Or(err, cerr)
	}
}

// alignV6Only gives a new socket the IPV6_V6ONLY of those that the address has. On a
// wildcard it is a matter of the place, so it changes nothing but what "tcp", "tcp6" and
// Control make of one; on any other address it means nothing, but the kernel's group is
// one of sockets that are equal in it.
func (a *address) alignV6Only(fd uintptr) {
	for _, c := range a.conns() {
		var only bool
		if c.Control(func(fd uintptr) { only = isV6Only(fd) }) == nil {
			setV6Only(fd, only)
			return
		}
	}
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
