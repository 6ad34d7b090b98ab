package lblisten

// What is in force and what is counted, and how it is written.

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
)

// Balancer is what spreads connections over the members of an address. As text and in
// JSON it is its String.
type Balancer int

const (
	BalancerNone       Balancer = iota // nothing: the listener is closed
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
		return system.option
	case BalancerDispatcher:
		return "dispatcher"
	}
	return fmt.Sprintf("Balancer(%d)", int(b))
}

// MarshalText returns String, or an error for a value that has no name.
func (b Balancer) MarshalText() ([]byte, error) {
	return marshalName(b, b >= BalancerNone && b <= BalancerDispatcher)
}

// UnmarshalText reads what MarshalText wrote, on whichever system.
func (b *Balancer) UnmarshalText(text []byte) error {
	switch string(text) {
	case "none":
		*b = BalancerNone
	case "SO_REUSEPORT", "SO_REUSEPORT_LB", "kernel":
		*b = BalancerKernel
	case "dispatcher":
		*b = BalancerDispatcher
	default:
		return fmt.Errorf("lblisten: %q is no Balancer", text)
	}
	return nil
}

// Steering is how connections are spread over the members of an address. As text
// and in JSON it is its String.
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

var steeringNames = []string{"flow", "source", "cpu", "load"}

// String returns "flow", "source", "cpu" or "load".
func (s Steering) String() string {
	if s < SteerFlow || s > SteerLoad {
		return fmt.Sprintf("Steering(%d)", int(s))
	}
	return steeringNames[s]
}

// MarshalText returns String, or an error for a value that has no name.
func (s Steering) MarshalText() ([]byte, error) {
	return marshalName(s, s >= SteerFlow && s <= SteerLoad)
}

// UnmarshalText reads what MarshalText wrote.
func (s *Steering) UnmarshalText(text []byte) error {
	for i, name := range steeringNames {
		if name == string(text) {
			*s = Steering(i)
			return nil
		}
	}
	return fmt.Errorf("lblisten: %q is no Steering: it is flow, source, cpu or load", text)
}

// byProgram tells whether the kernel steers so by a program that names sockets.
func (s Steering) byProgram() bool { return s == SteerSource || s == SteerLoad }

// Inheritance is a set of those who take over the queued connections of a member that
// goes away. The zero value is nobody: the kernel resets them. As text and in JSON
// it is its String.
type Inheritance int

const (
	InheritProcess Inheritance = 1 << iota // siblings in this process
	InheritKernel                          // any socket of the kernel's group
	InheritHandoff                         // other processes that hold the socket
	InheritSystemd                         // the next process of the service, to which systemd gives the socket
)

var inheritanceNames = []string{"process", "kernel", "handoff", "systemd"}

// String returns "none", or the parts joined by "+": "process+kernel".
func (i Inheritance) String() string {
	var parts []string
	for bit, name := range inheritanceNames {
		if i&(1<<bit) != 0 {
			parts = append(parts, name)
			i &^= 1 << bit
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

// MarshalText returns String, or an error for a set with parts that have no name.
func (i Inheritance) MarshalText() ([]byte, error) {
	return marshalName(i, i >= 0 && i < 1<<len(inheritanceNames))
}

// UnmarshalText reads what MarshalText wrote.
func (i *Inheritance) UnmarshalText(text []byte) error {
	var set Inheritance
	if string(text) != "none" {
	parts:
		for _, part := range strings.Split(string(text), "+") {
			for bit, name := range inheritanceNames {
				if name == part {
					set |= 1 << bit
					continue parts
				}
			}
			return fmt.Errorf("lblisten: %q is no Inheritance: it is none, or process, kernel, handoff and systemd, joined by +", text)
		}
	}
	*i = set
	return nil
}

func marshalName(v fmt.Stringer, known bool) ([]byte, error) {
	if !known {
		return nil, fmt.Errorf("lblisten: %v has no name", v)
	}
	return []byte(v.String()), nil
}

// Info is what is in force for a listener or a group at this moment. In a log it is a
// group of attributes; in JSON its fields have the names balancer, steering, on_close,
// on_kill, members, sockets and reason, which is a string and left out if there is none.
type Info struct {
	Balancer Balancer
	Steering Steering
	OnClose  Inheritance // who takes over when a member closes: siblings, if it has any; the others, when the last of this process does
	OnKill   Inheritance // who would take over if the process were killed now
	Members  int         // members of the address in this process
	Sockets  int         // kernel sockets of the address in this process

	// Reason is what is missing: nil if something would take over from a process that
	// is killed and all that was asked for is in force. Otherwise it begins with what
	// helps most.
	Reason error
}

// infoJSON is Info in JSON.
type infoJSON struct {
	Balancer Balancer    `json:"balancer"`
	Steering Steering    `json:"steering"`
	OnClose  Inheritance `json:"on_close"`
	OnKill   Inheritance `json:"on_kill"`
	Members  int         `json:"members"`
	Sockets  int         `json:"sockets"`
	Reason   string      `json:"reason,omitempty"`
}

// String returns a line like "SO_REUSEPORT by flow, members 4, sockets 4, on close
// process, on kill none: REASON".
func (i Info) String() string {
	s := fmt.Sprintf("%v by %v, members %d, sockets %d, on close %v, on kill %v", i.Balancer, i.Steering, i.Members, i.Sockets, i.OnClose, i.OnKill)
	if i.Reason != nil {
		s += ": " + i.Reason.Error()
	}
	return s
}

// LogValue returns a group of attributes.
func (i Info) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("balancer", i.Balancer.String()), slog.String("steering", i.Steering.String()),
		slog.String("on_close", i.OnClose.String()), slog.String("on_kill", i.OnKill.String()),
		slog.Int("members", i.Members), slog.Int("sockets", i.Sockets)}
	if i.Reason != nil {
		attrs = append(attrs, slog.String("reason", i.Reason.Error()))
	}
	return slog.GroupValue(attrs...)
}

// MarshalJSON writes the reason as its text.
func (i Info) MarshalJSON() ([]byte, error) {
	j := infoJSON{i.Balancer, i.Steering, i.OnClose, i.OnKill, i.Members, i.Sockets, ""}
	if i.Reason != nil {
		j.Reason = i.Reason.Error()
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads what MarshalJSON wrote. It keeps only the text of the reason.
func (i *Info) UnmarshalJSON(b []byte) error {
	var j infoJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	*i = Info{j.Balancer, j.Steering, j.OnClose, j.OnKill, j.Members, j.Sockets, nil}
	if j.Reason != "" {
		i.Reason = errors.New(j.Reason)
	}
	return nil
}

// Stats are the counters of a listener, or their sums over a group.
type Stats struct {
	Accepted uint64 // connections that Accept has returned

	// Inherited counts those of them that were accepted from the socket of a closed member
	// or of another process: until a new member adopts the socket, and for a minute at the
	// most, so that it doesn't grow in a steady service.
	Inherited uint64

	// Queued connections are established and no Accept has returned them yet: those
	// in the member's own socket, or in the shared one if it has none. Backlog is
	// the limit in force for them. Both are -1 where the system doesn't tell: it is
	// told for TCP on Linux, but not by gVisor, and on FreeBSD.
	Queued, Backlog int
}

// info returns what is in force. What would be claimed for others is looked up now.
func (a *address) info() Info {
	members := len(*a.members.Load())
	if members == 0 {
		return Info{Reason: net.ErrClosed}
	}
	socks := a.sockets()
	i := Info{Balancer: BalancerKernel, Steering: a.steering, Members: members, Sockets: len(socks)}
	if members > 1 {
		i.OnClose = InheritProcess
	}
	var noPeer, notKept, notSteered, noMigration error
	if a.h != nil {
		if noPeer = a.h.state(a.at); noPeer == nil {
			i.OnClose |= InheritHandoff
			i.OnKill |= InheritHandoff
		}
	}
	if a.systemd {
		if notKept = a.notKept(socks); notKept == nil {
			i.OnClose |= InheritSystemd
			i.OnKill |= InheritSystemd
		}
	}
	var others int // sockets of other processes in the kernel's group
	if a.d != nil {
		i.Balancer, noMigration = BalancerDispatcher, a.noKernel
		i.Sockets = max(1, i.Sockets) // of a listener behind Dispatch it isn't known
		if a.steering == SteerSource {
			notSteered = a.d.whyNotBySource()
		}
	} else {
		i.Steering, notSteered = a.k.inForce()
		if others, noMigration = a.k.inherits(); noMigration == nil {
			i.OnClose |= InheritKernel
			i.OnKill |= InheritKernel
		}
	}
	i.Reason = a.missing(i, others, noPeer, notKept, notSteered, noMigration)
	return i
}

// notKept tells why systemd doesn't hold the sockets of the address; nil if it does.
func (a *address) notKept(socks []*socket) error {
	if a.chosen {
		return errors.New("systemd keeps no socket whose port the system has chosen: nobody could ask for it again")
	}
	return systemd.holds(socks)
}

// missing returns why what is in force is not all that was asked for, or not enough.
func (a *address) missing(i Info, others int, noPeer, notKept, notSteered, noMigration error) error {
	if i.OnKill != 0 {
		return inOneLine(notKept, noPeer, notSteered)
	}
	helps := noPeer
	switch {
	case notKept != nil:
		helps = inOneLine(notKept, noPeer)
	case a.h == nil && canHandoff && others > 0:
		helps = errors.New("another process listens on the address, but nobody would take over from this one if it were killed: use WithHandoff with one path in both")
	case a.h == nil && canHandoff:
		helps = errors.New("nobody would take over from this process if it were killed: use WithHandoff, and run a second process or a keeper")
	case a.h != nil && others > 0:
		helps = fmt.Errorf("another process listens on the address without this path: %w", noPeer)
	}
	return inOneLine(helps, notSteered, noMigration)
}
