package lblisten

// A listening socket of the kernel's group: how it is opened, adopted, kept alive.

import (
	"cmp"
	"context"
	"net"
	"sync/atomic"
	"syscall"
)

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
