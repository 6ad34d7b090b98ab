//go:build unix && !aix

package lblisten

// The observer, which looks what is in the directory of a handoff, and is nobody's peer:
// for lbkeep -check.

import (
	"cmp"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/lblisten/lblisten/internal/keeper"
)

func init() { keeper.Look = lookInto }

// showObserver tells an observer everything, until it goes.
func (h *handoff) showObserver(l *link, r *frameReader) error {
	h.mu.Lock()
	l.send(parcel{frame: h.helloLocked()})
	for at := range h.pool.on {
		l.send(parcel{frame: frame{kind: frameOn, at: at}})
	}
	if h.pool.keeper {
		l.send(parcel{frame: frame{kind: frameKeeper, flags: flagOK}})
	}
	for _, f := range h.pool.all() {
		l.send(parcel{frame: f})
	}
	h.mu.Unlock()
	for {
		p, err := r.next()
		if err != nil {
			return err
		}
		p.d.release()
		if p.kind != frameWant {
			return errFrame
		}
		h.mu.Lock()
		if s := h.pool.sockets[p.id]; s != nil {
			l.send(parcel{s.frame(frameSocket), s.d})
		} else {
			l.send(parcel{frame: frame{kind: frameDrop, id: p.id}})
		}
		h.mu.Unlock()
	}
}

// lookInto is what an observer sees.
func lookInto(ctx context.Context, path string) (*keeper.Contents, error) {
	if err := checkHandoffPath(path); err != nil {
		return nil, err
	}
	ids, err := processesIn(path)
	if err != nil {
		return nil, err
	}
	all := new(keeper.Contents)
	sockets := make(map[id]*keeper.Socket)
	for _, x := range ids {
		p := keeper.Process{ID: x.String()}
		p.Err = observe(ctx, path, x, &p, sockets)
		all.Processes = append(all.Processes, p)
	}
	for _, s := range sockets {
		all.Sockets = append(all.Sockets, *s)
	}
	slices.SortFunc(all.Sockets, func(a, b keeper.Socket) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.Network, b.Network), slices.Compare(a.Owners, b.Owners))
	})
	return all, nil
}

// observe asks one process what it has.
func observe(ctx context.Context, path string, x id, p *keeper.Process, sockets map[id]*keeper.Socket) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", filepath.Join(path, x.String()))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := conn.(*net.UnixConn)
	c.SetDeadline(time.Now().Add(exchangeTime))
	if err := writeParcels(c, []parcel{{frame: frame{kind: frameHello, flags: flagObserver, n: handoffLowest<<16 | handoffHighest, id: newID(), at: place{network: helloName}}}}); err != nil {
		return err
	}
	r := &frameReader{c: c}
	defer r.drain()
	wants, synced := 0, false
	for !synced || wants > 0 {
		m, err := r.next()
		if err != nil {
			return err
		}
		s := sockets[m.id]
		switch m.kind {
		case frameHello:
			p.PID = m.sub
			if lowest, highest := int(m.n>>16), int(m.n&0xffff); lowest > handoffHighest || highest < handoffLowest {
				return errors.New("it speaks other versions of the protocol")
			}
		case frameOn:
			p.Addresses = append(p.Addresses, m.at.network+" "+m.at.String())
		case frameKeeper:
			p.Keeper = true
		case frameHas:
			if s == nil {
				s = &keeper.Socket{Network: m.sub, Address: m.at.network + " " + m.at.String(), Queued: -1, Backlog: -1}
				sockets[m.id] = s
				wants++
				if err := writeParcels(c, []parcel{{frame: frame{kind: frameWant, id: m.id}}}); err != nil {
					return err
				}
			}
			s.Holders++
			if m.flags&flagMine != 0 {
				s.Owners = append(s.Owners, p.PID)
			}
		case frameSocket:
			wants--
			if s != nil && m.d != nil {
				s.Queued, s.Backlog = queueLength(uintptr(m.d.fd))
			}
			m.d.release()
		case frameDrop:
			wants--
		case frameSynced:
			synced = true
		}
	}
	return nil
}
