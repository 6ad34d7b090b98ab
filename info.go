package lblisten

// What is in force, and what is counted.

import (
	"cmp"
	"fmt"
	"net"
	"strings"
	"syscall"
)

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
