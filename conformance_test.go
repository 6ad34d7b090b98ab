package lblisten

// The conformance suite: scenarios that kernels and event loops test of their
// own load balancing (FreeBSD's so_reuseport_lb_test, Linux's selftests of net
// and bpf, libuv's tcp_reuseport) and that users of package net expect, each of
// them in every mode: who balances, and who inherits beyond the process. It
// counts the connections on both ends, and says at the end how many were lost.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/nettest"
)

func TestConformance(t *testing.T) {
	ways := ways()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			w.need(t)
			if !alone(t) {
				return
			}
			for i := range conformance {
				row := &conformance[i]
				t.Run(row.name, func(t *testing.T) {
					noLeaks(t)
					r := &trial{T: t, way: w, row: row, opts: []Option{w.mode.opt}}
					if w.handoff {
						r.path = socketPath(t)
						r.opts = append(r.opts, WithHandoff(r.path))
					}
					defer func() {
						if t.Skipped() {
							w.skipped++
						} else {
							w.ran++
						}
					}()
					row.do(r)
				})
			}
		})
	}
	for _, w := range ways {
		if w.ran > 0 {
			t.Logf("conformance, %s, uid %d: %d scenarios, %d don't apply; %d tried, %d lost, %d more where a row says that they are",
				w.name, os.Getuid(), w.ran, w.skipped, w.dialled, w.lost, w.excused)
		}
		require.Zero(t, w.lost, w.name)
	}
}

func evenSpread(e endpoint) func(t *trial) {
	return func(t *trial) {
		e.need(t)
		ls := t.listen(e.network, e.listen, 8)
		w := t.accept(ls...)
		t.isSpread(w.end(w.dial(at(e.dial, ls[0]), count(256, 128))))
	}
}

// closeThose closes members in an order while connections wait; those that are
// left have all of them.
func closeThose(order ...int) func(t *trial) {
	return func(t *trial) {
		ls := t.group(6)
		clients := t.dial(ls[0].Addr(), 36)
		rest := slices.Clone(ls)
		for _, i := range order {
			require.NoError(t, ls[i].Close())
			rest = slices.DeleteFunc(rest, func(l *Listener) bool { return l == ls[i] })
		}
		t.serve(clients, rest...)
	}
}

// fromPorts dials from ports that are all even, or all odd.
func fromPorts(parity int) func(t *trial) {
	return func(t *trial) {
		n := 4
		if t.kernel() && runtime.GOOS == "freebsd" { // the hash keeps the parity of the port
			n = 3
		}
		ls := t.group(n)
		w := t.accept(ls...)
		var clients []client
		for port := 12000 + 2*rand.IntN(4000) + parity; len(clients) < 128 && port < 32000; port += 2 {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}, Timeout: limit(10 * time.Second)}
			w.pace()
			c, err := d.Dial("tcp", ls[0].Addr().String())
			if err != nil {
				require.True(t, isAddrInUse(err), "%v", err) // the next one
				continue
			}
			c.(*net.TCPConn).SetLinger(0)
			t.Cleanup(func() { c.Close() })
			clients = append(clients, t.client(c, byte(len(clients))))
			w.dialled++
		}
		require.Len(t, clients, 128)
		t.isSpread(w.end(clients))
	}
}

// linkLocal returns a link-local address of this machine, with its zone by name
// and by index.
func linkLocal() (name, index string) {
	ifis, _ := net.Interfaces()
	for _, ifi := range ifis {
		addrs, _ := ifi.Addrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() == nil && n.IP.IsLinkLocalUnicast() {
				return fmt.Sprintf("%v%%%s", n.IP, ifi.Name), fmt.Sprintf("%v%%%d", n.IP, ifi.Index)
			}
		}
	}
	return "", ""
}

// theEnd is why nobody can inherit.
func theEnd(*way) string { return "the last listener of all has closed" }

var conformance = []scenario{
	{name: "even spread over IPv4", do: evenSpread(endpoints[0])},
	{name: "even spread over IPv6", do: evenSpread(endpoints[1])},
	{name: "even spread over a dual-stack wildcard by IPv4", do: evenSpread(endpoints[2])},
	{name: "even spread over a dual-stack wildcard by IPv6", do: evenSpread(endpoints[3])},
	{name: "even client ports are spread", do: fromPorts(0)},
	{name: "odd client ports are spread", do: fromPorts(1)},
	{name: "a backlog is set, which listens twice", do: func(t *trial) {
		t.only(setsBacklog(), "the backlog can't be set here")
		ls := t.group(4, WithBacklog(100))
		w := t.accept(ls...)
		t.isSpread(w.end(w.dial(ls[0].Addr(), 128)))
	}},
	{name: "a socket joins the kernel's group twice", do: func(t *trial) {
		t.onlyKernel()
		twice := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = joinsKernel(fd) }), err)
		}}
		ls := t.group(4, WithListenConfig(twice))
		w := t.accept(ls...)
		t.isSpread(w.end(w.dial(ls[0].Addr(), 128)))
	}},
	{name: "many join and close at once", do: func(t *trial) {
		ls := t.group(2)
		w := t.accept(ls...)
		var wg sync.WaitGroup
		for range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for range 4 {
					l, err := Listen("tcp", ls[0].Addr().String(), t.opts...)
					if err == nil {
						err = l.Close()
					}
					if err != nil {
						t.Error(err)
					}
				}
			}()
		}
		wg.Wait()
		require.Equal(t, 2, ls[0].Info().Members)
		w.end(w.dial(ls[0].Addr(), 128))
	}},
	{name: "several loops on a port, and one closes", do: func(t *trial) {
		ls := t.group(4)
		w := t.accept(ls...)
		t.answered(w.dial(ls[0].Addr(), 128))
		require.NoError(t, ls[3].Close())
		before := w.got[3].Load()
		for i := range w.got {
			require.NotZero(t, w.got[i].Load(), "loop %d", i)
		}
		t.answered(t.dial(ls[0].Addr(), 128))
		require.Equal(t, before, w.got[3].Load())
	}},
	{name: "a member joins while the others wait", do: func(t *trial) {
		ls := t.group(3)
		w := t.accept(ls...)
		late := t.accept(t.join(ls[0]))
		for range 128 {
			w.pace()
			late.pace()
			t.answered(t.dial(ls[0].Addr(), 1))
		}
		for _, n := range []*atomic.Int64{&w.got[0], &w.got[1], &w.got[2], &late.got[0]} {
			require.NotZero(t, n.Load())
		}
	}},
	{name: "64 members join one by one, and one is left", do: func(t *trial) {
		ls := t.group(1)
		for range 63 {
			ls = append(ls, t.join(ls[0]))
		}
		require.Equal(t, 64, ls[0].Info().Members)
		clients := t.dial(ls[0].Addr(), queued(192, max(1, len(socketsAt(ls[0])))))
		for _, l := range ls[:63] {
			require.NoError(t, l.Close())
		}
		t.serve(clients, ls[63])
	}},
	{name: "the first one closes", do: closeThose(0)},
	{name: "the last one closes", do: closeThose(5)},
	{name: "those in the middle close", do: closeThose(2, 3)},
	{name: "all but the first close", do: closeThose(1, 2, 3, 4, 5)},
	{name: "all but the last close", do: closeThose(0, 1, 2, 3, 4)},
	{name: "all but the first close, backwards", do: closeThose(5, 4, 3, 2, 1)},
	{name: "all but the middle one close, from both ends", do: closeThose(0, 5, 1, 4, 2)},
	{name: "several goroutines close", do: func(t *trial) {
		ls := t.group(8)
		clients := t.dial(ls[0].Addr(), 48)
		var wg sync.WaitGroup
		for _, l := range ls[1:] {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		t.serve(clients, ls[0])
	}},
	{name: "one member is closed by several goroutines", do: func(t *trial) {
		ls := t.group(2)
		clients := t.dial(ls[0].Addr(), 24)
		errs := make(chan error)
		for range 8 {
			go func() { errs <- ls[0].Close() }()
		}
		closed := 0
		for range 8 {
			if err := <-errs; err == nil {
				closed++
			} else {
				require.ErrorIs(t, err, net.ErrClosed)
			}
		}
		require.Equal(t, 1, closed)
		t.serve(clients, ls[1])
	}},
	{name: "members close while their Accepts block", do: func(t *trial) {
		ls := t.group(4)
		var ends []<-chan result
		for _, l := range ls[:3] {
			ends = append(ends, blocked(t, l), blocked(t, l))
		}
		for _, l := range ls[:3] {
			require.NoError(t, l.Close())
		}
		for _, end := range ends {
			require.ErrorIs(t, get(t, end).err, net.ErrClosed)
		}
		t.serve(t.dial(ls[3].Addr(), 24), ls[3])
	}},
	{name: "a member that stands still closes, and its sibling accepts", do: func(t *trial) {
		ls := t.group(2)
		w := t.accept(ls[0])
		clients := t.dial(ls[0].Addr(), 64)
		require.NoError(t, ls[1].Close())
		clients = append(clients, t.dial(ls[0].Addr(), 64)...)
		w.end(clients)
	}},
	{name: "members close while clients dial", do: func(t *trial) {
		ls := t.group(6)
		w := t.accept(ls...)
		d := startLoad(4, "tcp", ls[0].Addr().String())
		for _, l := range ls[1:] {
			at := d.served.Load() + 20
			require.Eventually(t, func() bool { return d.served.Load() > at || d.failed.Load() > 0 }, limit(10*time.Second), time.Millisecond)
			require.NoError(t, l.Close())
		}
		t.loaded(d, false)
		w.stop()
	}},
	{name: "members join while clients dial", do: func(t *trial) {
		ls := t.group(1)
		t.accept(ls...)
		d := startLoad(4, "tcp", ls[0].Addr().String())
		for range 8 {
			at := d.served.Load() + 20
			t.accept(t.join(ls[0]))
			require.Eventually(t, func() bool { return d.served.Load() > at || d.failed.Load() > 0 }, limit(10*time.Second), time.Millisecond)
		}
		t.loaded(d, true)
	}},
	{name: "the last one of all closes", loses: theEnd, do: func(t *trial) {
		ls := t.group(3)
		clients := t.dial(ls[0].Addr(), 12)
		for _, l := range ls {
			require.NoError(t, l.Close())
		}
		require.Zero(t, t.answered(clients))
		_, err := dialOnce("tcp", ls[0].Addr().String())
		require.Error(t, err, "nobody listens")
	}},
	{name: "an address is listened on again after the last close", loses: theEnd, do: func(t *trial) {
		ls := t.group(2)
		for range 3 {
			clients := t.dial(ls[0].Addr(), 6)
			require.NoError(t, ls[0].Close())
			require.NoError(t, ls[1].Close())
			require.Zero(t, t.answered(clients))
			ls = t.listen("tcp", ls[0].Addr().String(), 2)
		}
		t.accept(ls...)
		require.Equal(t, 16, t.answered(t.dial(ls[0].Addr(), 16)))
	}},
	{name: "all members of a Group close at once, one of another is left", do: func(t *trial) {
		g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", t.opts...)
		other := t.join(ls[0])
		clients := t.dial(g.Addr(), 40)
		require.NoError(t, g.Close())
		t.serve(clients, other)
	}},
	{name: "a new member adopts what is queued", do: func(t *trial) {
		ls := t.group(2)
		clients := t.dial(ls[0].Addr(), 24)
		sockets := ls[0].Info().Sockets
		for range 10 {
			require.NoError(t, ls[0].Close())
			ls = []*Listener{ls[1], t.join(ls[1])}
			require.Equal(t, sockets, ls[0].Info().Sockets)
		}
		t.serve(clients, ls...)
	}},
	{name: "new members come before old ones go", do: func(t *trial) {
		ls := t.group(1)
		clients := t.dial(ls[0].Addr(), 12)
		for range 6 {
			next := t.join(ls[0])
			clients = append(clients, t.dial(next.Addr(), 12)...)
			require.NoError(t, ls[0].Close())
			ls[0] = next
		}
		t.serve(clients, ls[0])
	}},
	{name: "data sent before the accept survives inheritance", do: func(t *trial) {
		ls := t.group(4)
		data := bytes.Repeat([]byte("conformance!"), 1365) // 16 kB
		const n = 16
		for i := range n {
			c := dialTest(t, ls[0].Addr())
			t.dialled++
			_, err := c.Write(append([]byte{byte(i)}, data...))
			require.NoError(t, err)
			require.NoError(t, c.(*net.TCPConn).CloseWrite())
		}
		for _, l := range ls[1:] {
			require.NoError(t, l.Close())
		}
		seen := map[byte]bool{}
		for range n {
			got, err := io.ReadAll(acceptWithin(t, ls[0]))
			require.NoError(t, err)
			require.Equal(t, data, got[1:])
			seen[got[0]] = true
		}
		t.lose(n-len(seen), nil)
	}},
	{name: "clients that have sent FIN are answered", do: func(t *trial) {
		ls := t.group(3)
		clients := t.dial(ls[0].Addr(), 24)
		for _, c := range clients {
			require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		}
		require.NoError(t, ls[0].Close())
		require.NoError(t, ls[1].Close())
		t.serve(clients, ls[2])
	}},
	{name: "clients that are gone are accepted with what they sent", do: func(t *trial) {
		ls := t.group(3)
		for range 24 {
			c, err := net.Dial("tcp", ls[0].Addr().String())
			require.NoError(t, err)
			t.dialled++
			_, err = c.Write([]byte("bye"))
			require.NoError(t, err)
			require.NoError(t, c.Close())
		}
		require.NoError(t, ls[0].Close())
		require.NoError(t, ls[1].Close())
		for range 24 {
			got, err := io.ReadAll(acceptWithin(t, ls[2]))
			require.NoError(t, err)
			require.Equal(t, "bye", string(got))
		}
	}},
	{name: "clients that were reset in the queue hold up nobody", do: func(t *trial) {
		t.only(runtime.GOOS != "windows", resetOnWindows)
		ls := t.group(3)
		var clients []client
		for range 16 {
			clients = append(clients, t.dial(ls[0].Addr(), 1)...)
			dialTest(t, ls[0].Addr()).Close() // by a reset
		}
		require.NoError(t, ls[0].Close())
		w := t.accept(ls[1:]...) // whether those are accepted differs between systems
		t.answered(clients)
		require.GreaterOrEqual(t, w.got[0].Load()+w.got[1].Load(), int64(16))
	}},
	{name: "deadlines hold while connections wait", do: func(t *trial) {
		ls := t.group(3)
		clients := t.dial(ls[0].Addr(), 24)
		require.NoError(t, ls[0].Close())
		for _, l := range ls[1:] {
			require.NoError(t, l.SetDeadline(longPast))
			for range 3 {
				_, err := l.Accept()
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			}
			require.NoError(t, l.SetDeadline(time.Time{}))
		}
		t.serve(clients, ls[1:]...)
	}},
	{name: "a deadline ends one member's Accepts, others serve", do: func(t *trial) {
		ls := t.group(3)
		a, b := blocked(t, ls[0]), blocked(t, ls[0])
		w := t.accept(ls[1:]...)
		require.NoError(t, ls[0].SetDeadline(longPast))
		require.ErrorIs(t, get(t, a).err, os.ErrDeadlineExceeded)
		require.ErrorIs(t, get(t, b).err, os.ErrDeadlineExceeded)
		require.NoError(t, ls[0].Close())
		w.end(w.dial(ls[1].Addr(), 32))
	}},
	{name: "a full backlog drains", do: func(t *trial) {
		t.only(setsBacklog(), "the backlog can't be set here")
		t.only(runtime.GOOS == "linux", "past the backlog other systems reset, or take a long time to try again")
		ls := t.group(2, WithBacklog(4))
		d := new(load)
		const n = 30
		for range n {
			d.wg.Add(1)
			go func() {
				defer d.wg.Done()
				d.one("tcp", ls[0].Addr().String())
			}()
		}
		if full := ls[0].Stats().Backlog + 1; full > 0 {
			full *= len(socketsAt(ls[0]))
			require.Eventually(t, func() bool { return queuedAt(ls[0]) >= full }, limit(10*time.Second), time.Millisecond)
		}
		require.NoError(t, ls[1].Close())
		t.accept(ls[0])
		d.wg.Wait()
		if d.failed.Load() > 0 {
			skipIfNetLoses(t, 4, n)
		}
		t.loaded(d, false)
	}},
	{name: "groups of port 0 stay apart", do: func(t *trial) {
		a, b := t.group(3), t.group(3)
		wa, wb := t.accept(a...), t.accept(b...)
		ca, cb := t.dial(a[0].Addr(), 24), t.dial(b[0].Addr(), 40)
		wa.end(ca)
		wb.end(cb)
	}},
	{name: "IPv4 and IPv6 of a port stay apart", do: func(t *trial) {
		endpoints[1].need(t)
		a := t.group(2)
		b := t.listen("tcp", at("::1", a[0]).String(), 2)
		wa, wb := t.accept(a...), t.accept(b...)
		ca, cb := t.dial(a[0].Addr(), 24), t.dial(b[0].Addr(), 40)
		wa.end(ca)
		wb.end(cb)
	}},
	{name: "wildcards of IPv4 and IPv6 share a port", do: func(t *trial) {
		endpoints[1].need(t)
		a := t.listen("tcp4", "0.0.0.0:0", 2)
		b := t.listen("tcp6", at("::", a[0]).String(), 2)
		wa, wb := t.accept(a...), t.accept(b...)
		ca, cb := t.dial(at("127.0.0.1", a[0]), 24), t.dial(at("::1", a[0]), 40)
		wa.end(ca)
		wb.end(cb)
	}},
	{name: "a dual-stack wildcard is reached by both families", do: func(t *trial) {
		endpoints[3].need(t)
		ls := t.listen("tcp", ":0", 3)
		var clients []client
		for range 12 {
			for _, host := range []string{"127.0.0.1", "::1"} {
				clients = append(clients, t.dial(at(host, ls[0]), 1)...)
			}
		}
		require.NoError(t, ls[0].Close())
		require.NoError(t, ls[2].Close())
		t.serve(clients, ls[1])
	}},
	{name: "a mapped address is the IPv4 one", do: func(t *trial) {
		ls := t.listen("tcp", "[::ffff:127.0.0.1]:0", 2)
		l := t.join(ls[0])
		require.Equal(t, 3, l.Info().Members)
		clients := t.dial(at("127.0.0.1", l), 12)
		require.NoError(t, ls[0].Close())
		t.serve(clients, ls[1], l)
	}},
	{name: "an address with a zone", do: func(t *trial) {
		endpoints[1].need(t)
		lo, err := nettest.LoopbackInterface()
		t.only(err == nil, "no loopback interface")
		host := "::1%" + lo.Name
		plain, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		t.only(err == nil, "package net doesn't listen on "+host)
		plain.Close()
		ls := t.listen("tcp", net.JoinHostPort(host, "0"), 2)
		other := t.join(ls[0])
		require.Equal(t, 3, other.Info().Members, "the kernel ignores a zone but of a link-local address")
		clients := append(t.dial(ls[0].Addr(), 12), t.dial(at("::1", ls[0]), 12)...)
		require.NoError(t, ls[0].Close())
		t.serve(clients, ls[1], other)
	}},
	{name: "a link-local address, its zone by name or index", do: func(t *trial) {
		host, index := linkLocal()
		t.only(host != "", "no interface has a link-local address")
		plain, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		t.only(err == nil, "package net doesn't listen on "+host)
		plain.Close()
		ls := t.listen("tcp", net.JoinHostPort(index, "0"), 2)
		other := t.join(ls[0])
		require.Equal(t, 3, other.Info().Members, "%v", other.Addr())
		clients := t.dial(ls[0].Addr(), 12)
		require.NoError(t, ls[0].Close())
		t.serve(clients, ls[1], other)
	}},
	{name: "spellings of an address are one group", do: func(t *trial) {
		endpoints[3].need(t)
		ls := t.listen("tcp", ":0", 1)
		port := strconv.Itoa(ls[0].Addr().(*net.TCPAddr).Port)
		for _, spelled := range []string{":", "0.0.0.0:", "[::]:"} {
			ls = append(ls, t.listen("tcp", spelled+port, 1)...)
		}
		require.Equal(t, 4, ls[0].Info().Members)
		w := t.accept(ls...)
		t.isSpread(w.end(append(w.dial(at("127.0.0.1", ls[0]), 64), w.dial(at("::1", ls[0]), 64)...)))
	}},
	{name: "a specific address beats the wildcard", do: func(t *trial) {
		t.onlyKernel()
		t.only(runtime.GOOS == "linux", "systems differ; Linux prefers the specific address")
		specific := t.group(2)
		wildcard := t.listen("tcp4", at("0.0.0.0", specific[0]).String(), 2)
		ws, ww := t.accept(specific...), t.accept(wildcard...)
		cs, cw := t.dial(specific[0].Addr(), 24), t.dial(at("127.0.0.2", specific[0]), 40)
		ws.end(cs)
		ww.end(cw)
	}},
	{name: "accepted connections have their addresses", do: func(t *trial) {
		ls := t.listen("tcp", ":0", 3)
		clients := map[string]string{}
		for range 12 {
			c := t.dial(ls[0].Addr(), 1)[0]
			clients[c.LocalAddr().String()] = c.RemoteAddr().String()
		}
		require.NoError(t, ls[0].Close())
		require.NoError(t, ls[1].Close())
		for len(clients) > 0 {
			c := acceptWithin(t, ls[2])
			remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			client := net.JoinHostPort(remote.Addr().Unmap().String(), strconv.Itoa(int(remote.Port())))
			require.Equal(t, clients[client], c.LocalAddr().String())
			delete(clients, client)
		}
	}},
	{name: "a member's queue is in order", do: func(t *trial) {
		ls := t.group(1)
		var want, got []string
		for _, c := range t.dial(ls[0].Addr(), 24) {
			want, got = append(want, c.LocalAddr().String()), append(got, acceptWithin(t, ls[0]).RemoteAddr().String())
		}
		if slices.Equal(want, got) {
			return
		}
		for tried := range 1000 { // is it the system?
			plain, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			ordered := true
			var clients, servers []net.Conn
			for range 24 {
				c, err := dialOnce("tcp", plain.Addr().String())
				require.NoError(t, err)
				clients = append(clients, c)
			}
			for _, c := range clients {
				s, err := plain.Accept()
				require.NoError(t, err)
				ordered = ordered && c.LocalAddr().String() == s.RemoteAddr().String()
				servers = append(servers, s)
			}
			for _, c := range append(clients, servers...) {
				c.Close()
			}
			plain.Close()
			if !ordered {
				t.Skipf("net.Listen's queue isn't in order either: the %dth that was tried", tried+1)
			}
		}
		require.Equal(t, want, got)
	}},
	{name: "eight Accepts of a member", do: func(t *trial) {
		ls := t.group(2)
		clients := t.dial(ls[0].Addr(), 64)
		require.NoError(t, ls[0].Close())
		t.serve(clients, slices.Repeat(ls[1:], 8)...)
	}},
	{name: "Accept and AcceptTCP take turns", do: func(t *trial) {
		ls := t.group(2)
		clients := t.dial(ls[0].Addr(), 24)
		require.NoError(t, ls[0].Close())
		ls[1].SetDeadline(time.Now().Add(limit(10 * time.Second)))
		for i := range clients {
			c, err := net.Conn(nil), error(nil)
			if i%2 == 0 {
				c, err = ls[1].AcceptTCP()
			} else {
				c, err = ls[1].Accept()
			}
			require.NoError(t, err)
			go echoConn(c)
		}
		t.answered(clients)
	}},
	{name: "Info and Stats are what happened", do: func(t *trial) {
		g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", t.opts...)
		i := g.Info()
		require.Equal(t, 3, i.Members)
		require.Equal(t, map[bool]int{true: 3, false: 1}[t.kernel()], i.Sockets)
		require.Equal(t, map[bool]Balancer{true: BalancerKernel, false: BalancerDispatcher}[t.kernel()], i.Balancer)
		require.Equal(t, t.inherits, i.OnKill&InheritKernel != 0 && !t.handoff)
		clients := t.dial(g.Addr(), 30)
		waiting := g.Stats().Queued
		require.Contains(t, []int{-1, 30}, waiting)
		require.NoError(t, ls[0].Close())
		require.Equal(t, waiting, g.Stats().Queued)
		got := t.serve(clients, ls[1:]...)
		require.EqualValues(t, got[0], ls[1].Stats().Accepted)
		require.EqualValues(t, got[1], ls[2].Stats().Accepted)
		s := g.Stats()
		require.EqualValues(t, 30, s.Accepted)
		require.Equal(t, t.kernel(), s.Inherited > 0, "%+v", s)
		require.Contains(t, []int{-1, 0}, s.Queued)
		require.Equal(t, 2, g.Info().Members)
	}},
	{name: "a unix socket", do: func(t *trial) {
		t.only(!t.kernel(), "the kernel balances TCP only")
		t.only(nettest.TestableNetwork("unix") && runtime.GOOS != "windows", "no unix sockets with files here")
		path := socketPath(t)
		ls := t.listen("unix", path, 3)
		clients := t.dial(ls[0].Addr(), 24)
		require.NoError(t, ls[0].Close())
		t.serve(clients, ls[1:]...)
		require.NoError(t, ls[1].Close())
		t.serve(t.dial(ls[2].Addr(), 12), ls[2])
		require.FileExists(t, path)
		require.NoError(t, ls[2].Close())
		require.NoFileExists(t, path)
	}},
	{name: "a source stays at its member", do: func(t *trial) {
		if t.handoff {
			_, err := Listen("tcp", "127.0.0.1:0", append(t.opts, WithSteering(SteerSource))...)
			require.ErrorIs(t, err, ErrUnsupported)
			return
		}
		t.needSteering(SteerSource)
		ls := t.group(4, WithSteering(SteerSource))
		w := t.accept(ls...)
		for range 24 {
			t.answered(w.dial(ls[0].Addr(), 1)) // the dispatcher doesn't wait long for a busy one
		}
		most := int64(0)
		for i := range w.got {
			most = max(most, w.got[i].Load())
		}
		require.EqualValues(t, 24, most)
	}},
}

// skipIfNetLoses skips where a socket of package net loses clients past its backlog: in
// gVisor a client may be connected of which the socket knows nothing.
func skipIfNetLoses(t *trial, backlog, n int) {
	t.Helper()
	for tried := range 100 {
		plain, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, limitQueue(plain, backlog))
		d := new(load)
		for range n {
			d.wg.Add(1)
			go func() {
				defer d.wg.Done()
				d.one("tcp", plain.Addr().String())
			}()
		}
		time.Sleep(300 * time.Millisecond) // there is nothing to wait for
		var wg sync.WaitGroup
		wg.Add(1)
		go echo(&wg, plain, new(atomic.Int64))
		d.wg.Wait()
		plain.Close()
		wg.Wait()
		if lost := d.failed.Load(); lost > 0 {
			t.Skipf("past its backlog net.Listen's socket loses clients as well: %d of the %dth %d", lost, tried+1, n)
		}
	}
}
