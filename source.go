package lblisten

// What the dispatcher accepts from: how it is opened, bound anew when the file of a
// unix socket is gone, and closed.

import (
	"context"
	"net"
	"syscall"
	"time"
)

// A source is what a dispatcher accepts from. It never changes, but for woken.
type source struct {
	ln        net.Listener
	deadliner interface{ SetDeadline(time.Time) error } // ln, if its Accept can be woken; nil: the pump leads
	s         *socket                                   // of ln; nil if ln is foreign
	finish    func(net.Conn)                            // what its connections need, nil for nothing
	woken     bool                                      // it has a deadline that the leader takes back; guarded by the dispatcher's wakeMu
}

// sourceOf makes a source of a listener, s if it is one of this package.
func sourceOf(ln net.Listener, s *socket, finish func(net.Conn)) *source {
	from := &source{ln: ln, s: s, finish: finish}
	if dl, ok := ln.(interface{ SetDeadline(time.Time) error }); ok && dl.SetDeadline(time.Time{}) == nil {
		from.deadliner = dl
	}
	return from
}

// use makes the dispatcher accept from a first listener, before it has a member.
func (d *dispatcher) use(from *source) {
	d.from = from
	switch ln := from.ln.(type) { // not by method: a wrapper may hand out connections of its own
	case *net.TCPListener:
		d.isTCP = true
	case *Listener:
		d.isTCP = ln.a.d == nil || ln.a.d.isTCP
	}
}

// open opens the dispatcher's socket. With a handoff it is the one of all processes:
// whoever is first makes it. It is called with the turn.
func (d *dispatcher) open(ctx context.Context, req *request) error {
	const patience = time.Second // for whoever is making it at this moment
	a := d.a
	for begin := time.Now(); ; {
		if a.h != nil && !a.at.isNew() {
			s, err := a.h.find(a)
			if err != nil {
				return err
			}
			if s != nil {
				if s.kept, err = a.keep(s.conn, s.file); err != nil {
					s.ln.Close()
					return err
				}
				d.use(sourceOf(s.ln, s, finishKeepAlive(req.keepAlive)))
				return nil
			}
		}
		s, err := a.listen(ctx, a.network, req.literal, a.at, req)
		if err == nil {
			d.use(sourceOf(s.ln, s, nil))
			return nil
		}
		if a.h == nil || !isAddrInUse(err) || time.Since(begin) >= patience {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// renew binds a unix socket anew if its file isn't at its path any more, because
// somebody has removed or renamed it. The one before is shared from then on, for
// those who are queued there or still reach it. It is called with the turn.
func (d *dispatcher) renew(ctx context.Context, req *request) error {
	before := d.source()
	if before.s == nil || before.s.hasFile(d.a.at) {
		return nil
	}
	s, err := d.a.listen(ctx, d.a.network, req.literal, d.a.at, req)
	if err != nil {
		return err
	}
	d.replace(sourceOf(s.ln, s, nil))
	d.a.share(newWatch(d.a, before.s, before.finish))
	if p := before.s.pooled; p != nil {
		d.a.h.letShare(p)
	}
	d.a.note(req.log, news, "the file of the socket is gone, it was bound anew", "address", d.a.addr)
	return nil
}

// replace makes the dispatcher accept from another socket from now on. When it returns
// no leader is in the one before any more: its deadlines are others' then.
func (d *dispatcher) replace(from *source) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.from
	d.from = from
	if d.in == before {
		d.interruptLocked()
	}
	for d.in == before {
		d.out.Wait()
	}
}

func (d *dispatcher) source() *source {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.from
}

func (d *dispatcher) conns() []syscall.RawConn {
	if sc, ok := d.source().ln.(syscall.Conn); ok {
		if c, err := sc.SyscallConn(); err == nil {
			return []syscall.RawConn{c}
		}
	}
	return nil
}

// end closes the source, and what nobody can take any more. The file of a unix socket
// stays if other processes accept from it.
func (d *dispatcher) end(stays func(*socket) bool) error {
	d.mu.Lock()
	d.closed = true
	var late []arrival
	for len(d.hand) > 0 {
		late = append(late, d.takeLocked(0).arrival)
	}
	from := d.from
	d.mu.Unlock()
	for _, r := range late {
		if r.c != nil {
			r.c.Close()
		}
	}
	if from == nil {
		return nil // it was never opened
	}
	if from.s == nil {
		return from.ln.Close()
	}
	if !stays(from.s) {
		from.s.removeFile(d.a.at)
	}
	return from.s.close()
}
