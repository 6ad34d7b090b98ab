package lblisten

// What is one address, and what are two.

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// One address is one group, however it is spelled.
func TestOneAddressIsOneGroup(t *testing.T) {
	_, _, err := resolved("tcp", "localhost:0")
	if err != nil {
		t.Skipf("localhost has no address here: %v", err)
	}
	inModes(t, func(t *testing.T, m mode) {
		for _, spelled := range [][]string{
			{"tcp 127.0.0.1:0", "tcp localhost:PORT", "tcp4 localhost:PORT", "tcp4 127.0.0.1:PORT", "tcp [::ffff:127.0.0.1]:PORT"},
			{"tcp :0", "tcp 0.0.0.0:PORT", "tcp [::]:PORT", "tcp :PORT"},
			{"tcp4 0.0.0.0:0", "tcp4 :PORT"},
			{"tcp6 [::1]:0", "tcp [::1]:PORT", "tcp6 [0:0::1]:PORT"},
		} {
			network, address, _ := strings.Cut(spelled[0], " ")
			if network == "tcp6" {
				endpoints[1].need(t)
			}
			if network == "tcp" && address == ":0" && (runtime.GOOS == "dragonfly" || runtime.GOOS == "openbsd") {
				continue // there it is what net makes of it
			}
			first, err := Listen(network, address, m.opt)
			require.NoError(t, err)
			port := strconv.Itoa(first.Addr().(*net.TCPAddr).Port)
			for _, s := range spelled[1:] {
				network, address, _ := strings.Cut(strings.ReplaceAll(s, "PORT", port), " ")
				l, err := Listen(network, address, m.opt)
				require.NoError(t, err, s)
				require.Equal(t, 2, l.(*Listener).Info().Members, s)
				require.NoError(t, l.Close())
			}
			require.NoError(t, first.Close())
		}
	})
}

// Port 0 opens a new group each time, and the members of one share its port.
func TestPortZeroIsANewGroup(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, e := range endpoints[:3] {
			e.need(t)
			a, as := newTestGroup(t, 3, e.network, e.listen, m.opt)
			b, _ := newTestGroup(t, 3, e.network, e.listen, m.opt)
			require.NotEqual(t, a.Addr().String(), b.Addr().String())
			for _, l := range as {
				require.Equal(t, a.Addr(), l.Addr())
				require.NotZero(t, l.Addr().(*net.TCPAddr).Port)
			}
			a.Close()
			b.Close()
		}
	})
}

// Unix sockets are balanced by the dispatcher, and the file goes with the last
// member.
func TestUnixSocket(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			noLeaks(t)
			path := socketPath(t)
			if runtime.GOOS == "windows" {
				t.Skip("not tried on Windows: wine has no unix sockets")
			}
			plain, err := net.Listen(network, path)
			if err != nil {
				t.Skipf("no %s here: %v", network, err)
			}
			require.NoError(t, plain.Close())
			a, err := Listen(network, path, WithLB())
			require.NoError(t, err)
			b, err := Listen(network, path, WithLB())
			require.NoError(t, err)
			i := a.(*Listener).Info()
			require.Equal(t, BalancerDispatcher, i.Balancer)
			require.Error(t, i.Reason)
			require.Equal(t, 2, i.Members)
			require.Equal(t, 1, i.Sockets)
			_, err = a.(*Listener).AcceptTCP()
			require.ErrorIs(t, err, ErrUnsupported)

			var clients []net.Conn
			for range 20 {
				clients = append(clients, dialTest(t, a.Addr()))
			}
			var got [2]int
			for range clients {
				for i, l := range []net.Listener{a, b} {
					if c, err := acceptBy(l, 5*time.Millisecond); err == nil {
						require.IsType(t, (*net.UnixConn)(nil), c)
						got[i]++
						c.Close()
					}
				}
			}
			require.Equal(t, 20, got[0]+got[1])
			require.NoError(t, a.Close())
			dialTest(t, b.Addr())
			acceptWithin(t, b)
			_, err = os.Stat(path)
			require.NoError(t, err)
			require.NoError(t, b.Close())
			_, err = os.Stat(path)
			require.ErrorIs(t, err, os.ErrNotExist)

			// A file that nobody listens on: the error says so.
			require.NoError(t, os.WriteFile(path, nil, 0o600))
			_, err = Listen(network, path, WithLB())
			require.ErrorContains(t, err, "remove the file")
		})
	}
}

// However an address is spelled: resolve agrees with package net on whether it
// can be listened on, gives one place for all spellings, and opens nothing.
func FuzzAddress(f *testing.F) {
	for _, s := range []string{"127.0.0.1:80", "[::1]:80", ":80", "0.0.0.0:80", "[::]:80", "[::ffff:127.0.0.1]:80", "127.0.0.1:http",
		"[fe80::1%lo]:80", "127.0.0.1:", ":", "", "[]:80", "1:2:3", "127.0.0.1:-1", "127.0.0.1:65536", "127.1:80", "[::1%]:80", "[::127.0.0.1]:0"} {
		f.Add("tcp", s)
		f.Add("tcp4", s)
		f.Add("tcp6", s)
	}
	f.Fuzz(func(t *testing.T, network, address string) {
		if network != "tcp" && network != "tcp4" && network != "tcp6" {
			return
		}
		host, _, err := net.SplitHostPort(address)
		if err == nil && host != "" {
			if _, err := netip.ParseAddr(host); err != nil {
				return // a name, which would be looked up
			}
		}
		at, _, err := resolved(network, address)
		if err != nil {
			require.IsType(t, (*net.OpError)(nil), err)
			_, want := net.Listen(network, address)
			require.Error(t, want, "package net listens on it, resolve says %v", err)
			return
		}
		require.Contains(t, []string{"tcp", "tcp4", "tcp6"}, at.network)
		require.NotEmpty(t, at.host)
		again, _, err := resolved(network, at.String())
		require.NoError(t, err, "%v", at)
		require.Equal(t, at, again)
	})
}
