package lblisten

// What an address is, as package net and the kernel understand it.

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"syscall"
)

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

// split returns the addresses of a member's sockets: two, where a dual-stack
// socket would not be balanced.
func (p place) split() []place {
	if splitDualStack && p.network == "tcp" {
		return []place{{"tcp4", "0.0.0.0", p.port}, {"tcp6", "::", p.port}}
	}
	return []place{p}
}
