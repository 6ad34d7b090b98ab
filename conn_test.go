package lblisten

// Accepted connections are net.Conns, whichever way they come.

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/nettest"
)

// An opening opens listeners, and returns an address to dial and an Accept.
type opening struct {
	name string
	open func(t *testing.T) (net.Addr, func() (net.Conn, error))
}

// accepted is ways by which a connection can come.
var accepted = []opening{
	{"own socket", ofGroup(modes[0], 1, false)},
	{"own and inherited sockets", ofGroup(modes[0], 9, false)},
	{"own and inherited sockets, AcceptTCP", ofGroup(modes[0], 9, true)},
	{"dispatcher", ofGroup(modes[1], 2, false)},
	{"dispatcher, AcceptTCP", ofGroup(modes[1], 2, true)},
	{"Dispatch of a plain listener", dispatched(func(ln net.Listener) net.Listener { return ln })},
	{"Dispatch of a listener without deadlines", dispatched(func(ln net.Listener) net.Listener { return struct{ net.Listener }{ln} })},
	{"unix socket", func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
		if !nettest.TestableNetwork("unix") {
			t.Skip("no unix sockets here")
		}
		g, ls := newTestGroup(t, 2, "unix", socketPath(t), WithLB())
		return g.Addr(), ls[0].Accept
	}},
}

// ofGroup opens a group of which one member is left.
func ofGroup(m mode, n int, tcp bool) func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
	return func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
		m.need(t)
		g, ls := newTestGroup(t, n, "tcp", "127.0.0.1:0", m.opt)
		for _, l := range ls[1:] {
			require.NoError(t, l.Close())
		}
		if tcp {
			return g.Addr(), func() (net.Conn, error) { return ls[0].AcceptTCP() }
		}
		return g.Addr(), ls[0].Accept
	}
}

func dispatched(wrap func(net.Listener) net.Listener) func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
	return func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		_, ls := dispatchTest(t, wrap(ln), 2)
		return ln.Addr(), ls[1].Accept
	}
}

// Accepted connections are conforming net.Conns, whichever way they came.
func TestConn(t *testing.T) {
	beside(t)
	for _, c := range accepted {
		t.Run(c.name, func(t *testing.T) {
			beside(t)
			a, accept := c.open(t)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				if c1, err = net.Dial(a.Network(), a.String()); err != nil {
					return nil, nil, nil, err
				}
				if c2, err = accept(); err != nil {
					c1.Close()
					return nil, nil, nil, err
				}
				return c1, c2, func() { c1.Close(); c2.Close() }, nil
			})
		})
	}
}
