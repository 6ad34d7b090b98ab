package lblisten

// What an address is, as package net and the kernel understand it. Nothing here
// knows of members or groups.

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
)

// A place is where sockets listen, however the address was spelled. Two sockets
// of one place can stand in for each other; of two places they are strangers.
type place struct {
	network string // "tcp4", "tcp6", "tcp" for a dual-stack wildcard, "unix", "unixpacket"
	host    string // a literal address with its zone, an absolute path, or an abstract name
	port    int
	space   uint64 // the network namespace of the sockets; 0 for a file, and on systems without
	device  int    // the index of the interface that they are bound to, 0 for none
}

// isNew tells whether the system is to choose the port or the name.
func (p place) isNew() bool { return p.port == 0 && !p.isUnix() || p.host == "" }

// of returns the place with the port or the name that the system has chosen.
func (p place) of(addr net.Addr) place {
	switch addr := addr.(type) {
	case *net.TCPAddr:
		p.port = addr.Port
	case *net.UnixAddr:
		if !p.isFile() {
			p.host = addr.Name
		}
	}
	return p
}

// isUnix tells whether it is a unix socket's.
func (p place) isUnix() bool { return p.network == "unix" || p.network == "unixpacket" }

// isFile tells whether it is a unix socket with a file.
func (p place) isFile() bool { return p.isUnix() && p.host != "" && p.host[0] != '@' }

// String is what to ask of package net.
func (p place) String() string {
	if p.isUnix() {
		return p.host
	}
	return net.JoinHostPort(p.host, strconv.Itoa(p.port))
}

// split returns the places of a member's sockets: two, where a dual-stack
// socket would not be balanced.
func (p place) split() []place {
	if !system.splitDualStack || p.network != "tcp" {
		return []place{p}
	}
	v4, v6 := p, p
	v4.network, v4.host = "tcp4", "0.0.0.0"
	v6.network, v6.host = "tcp6", "::"
	return []place{v4, v6}
}

// facts are what a socket is besides its address.
type facts struct {
	space  uint64 // its network namespace, 0 if the system has none
	device int    // the index of the interface that it is bound to, 0 for none
	only   bool   // IPV6_V6ONLY
}

// A request is what one Listen asks for, as package net has understood it.
type request struct {
	*config
	network   string // as the caller spelled it
	literal   string // the address as the caller spelled it, but for names of hosts and ports
	at        place
	noKernel  error     // why the kernel can't balance there; nil if it can
	keepAlive keepAlive // what a socket of its own would give to connections
	program   bool      // its Control attaches a reuseport program

	noPrograms error // why no reuseport program can be in force; nil if one may
}

var errProbe = errors.New("the probe ends before bind")

// resolve finds out what package net makes of an address, and whether the kernel
// can balance there. Package net itself is asked, by listening with a Control hook
// that sees the address and the socket, after the user's Control has set what it
// likes, and then refuses: so an address means here what it means there, and a bad
// one gets net's error.
func resolve(ctx context.Context, network, address string, cfg *config) (*request, error) {
	r := &request{config: cfg, network: network}
	var family string
	var is facts
	probe := cfg.lc
	probe.SetMultipathTCP(false)
	probe.Control = chainControl(cfg.lc.Control, func(n, a string, c syscall.RawConn) error {
		family, r.literal = n, a
		r.noKernel = errProbe // in case Control doesn't run
		if err := c.Control(func(fd uintptr) { is = r.examine(fd, n) }); err != nil {
			return err
		}
		return errProbe
	})
	switch runtime.GOOS {
	case "plan9", "js", "wasip1": // package net calls no Control
		a, err := net.ResolveTCPAddr(network, address)
		if err != nil {
			return nil, listenError(network, address, err)
		}
		family, r.literal, r.noKernel = "tcp6", a.String(), joinKernelGroup(0)
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
			return nil, listenError(network, address, err)
		}
	}
	var err error
	if r.at, err = placeOf(network, family, r.literal, is); err != nil {
		return nil, listenError(network, address, err)
	}
	return r, nil
}

// examine finds out what the probe's socket is.
func (r *request) examine(fd uintptr, family string) facts {
	is := factsOf(fd)
	if family != "tcp4" && family != "tcp6" {
		r.noKernel = errors.New("the kernel balances TCP only")
		return is
	}
	r.noKernel = joinKernelGroup(fd)
	if r.lc.Control != nil {
		r.program, r.noPrograms = takeProgram(fd)
	} else if r.steering.byProgram() {
		r.noPrograms = noPrograms()
	}
	_, set := lean(r.lc)
	set(fd)
	r.keepAlive = keepAliveOf(fd, r.lc)
	return is
}

// placeOf returns the place of an address that package net has spelled.
func placeOf(network, family, literal string, is facts) (place, error) {
	at := place{network: family, host: literal, space: is.space, device: is.device}
	if at.isFile() {
		at.space, at.device = 0, 0 // a file is found by its path, from everywhere
		var err error
		at.host, err = filepath.Abs(at.host) // the directory may change
		return at, err
	}
	if at.isUnix() {
		return at, nil
	}
	host, port, err := net.SplitHostPort(literal)
	if err != nil {
		return at, err
	}
	if at.port, err = strconv.Atoi(port); err != nil {
		return at, err
	}
	at.host = spellZone(host)
	if host == "" || host == "0.0.0.0" || host == "::" {
		at.host = map[string]string{"tcp4": "0.0.0.0", "tcp6": "::"}[family]
		if family == "tcp6" && isDualStack(network, is) {
			at.network = "tcp"
		}
	}
	return at, nil
}

// isDualStack tells whether an IPv6 wildcard socket takes IPv4 as well. DragonFly
// and OpenBSD have no such socket; elsewhere the user's Control has the last word.
func isDualStack(network string, is facts) bool {
	switch runtime.GOOS {
	case "dragonfly", "openbsd":
		return false
	case "windows", "plan9", "js", "wasip1": // not asked of the socket
		return network == "tcp"
	}
	return !is.only
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
