package lblisten

// What the scenarios of the conformance suite are written with: the modes, a trial,
// its clients, and a crew of members that accept.

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A way is a mode of the suite.
type way struct {
	name     string
	mode     mode
	inherits bool // the kernel inherits from a process that goes away
	handoff  bool
	tally
}

// need skips the modes that this system or user doesn't have.
func (w *way) need(t *testing.T) {
	w.mode.need(t)
	if w.handoff {
		if !handsOff() {
			t.Skipf("no handoff on %s", runtime.GOOS)
		}
		if os.Geteuid() == 0 {
			t.Skip("root: TestUnprivileged runs it as another user, for whom the kernel doesn't inherit")
		}
		return
	}
	if !w.kernel() {
		return
	}
	ln, err := Listen("tcp", "127.0.0.1:0", w.mode.opt)
	require.NoError(t, err)
	i := ln.(*Listener).Info()
	require.NoError(t, ln.Close())
	switch has := i.OnKill&InheritKernel != 0; {
	case has == w.inherits:
	case has && os.Geteuid() == 0:
		t.Skip("the kernel inherits for root: TestUnprivileged runs it as another user")
	case has:
		t.Skip("the kernel inherits for everybody here")
	default:
		t.Skipf("the kernel doesn't inherit here: %v", i.Reason)
	}
}

func (w *way) kernel() bool { return w.mode.name == "kernel" }

// A tally is what happened in a mode.
type tally struct{ ran, skipped, dialled, lost, excused int }

func ways() []*way {
	return []*way{
		{name: "kernel that inherits", mode: modes[0], inherits: true},
		{name: "kernel without privilege", mode: modes[0]},
		{name: "dispatcher", mode: modes[1]},
		{name: "handoff by kernel", mode: modes[0], handoff: true},
		{name: "handoff by dispatcher", mode: modes[1], handoff: true},
	}
}

// A scenario is a row of the suite.
type scenario struct {
	name  string
	do    func(t *trial)
	loses func(w *way) string // the documented exception: why a mode may lose here, "" if it may not
}

// A trial is a scenario in a mode.
type trial struct {
	*testing.T
	*way
	row  *scenario
	opts []Option
	path string // of the handoff
}

// only skips the scenario where it doesn't apply.
func (t *trial) only(applies bool, why string) {
	t.Helper()
	if !applies {
		t.Skip(why)
	}
}

func (t *trial) onlyKernel() {
	t.Helper()
	t.only(t.kernel(), "it is about sockets of the kernel's group, and the dispatcher has one socket")
}

// listen opens n members.
func (t *trial) listen(network, address string, n int, more ...Option) []*Listener {
	t.Helper()
	_, ls := newTestGroup(t, n, network, address, slices.Concat(t.opts, more)...)
	return ls
}

func (t *trial) group(n int, more ...Option) []*Listener {
	t.Helper()
	return t.listen("tcp", "127.0.0.1:0", n, more...)
}

// needSteering skips the scenario where the system doesn't steer so.
func (t *trial) needSteering(s Steering) {
	t.Helper()
	needSteering(t, slices.Concat(t.opts, []Option{WithSteering(s)})...)
}

func (t *trial) join(l *Listener, more ...Option) *Listener {
	t.Helper()
	return joinTest(t, l, slices.Concat(t.opts, more)...)
}

// at is the address by which a listener is reached at another host.
func at(host string, l net.Listener) net.Addr {
	ip, zone, _ := strings.Cut(host, "%")
	return &net.TCPAddr{IP: net.ParseIP(ip), Zone: zone, Port: l.Addr().(*net.TCPAddr).Port}
}

// A client has sent a byte and expects it back.
type client struct {
	net.Conn
	sent byte
}

// dial connects n clients.
func (t *trial) dial(a net.Addr, n int) []client {
	t.Helper()
	clients := make([]client, n)
	for i := range clients {
		clients[i] = t.client(dialTest(t, a), byte(i))
	}
	return clients
}

// client makes a connection a client.
func (t *trial) client(c net.Conn, b byte) client {
	t.Helper()
	t.dialled++
	_, err := c.Write([]byte{b})
	require.NoError(t, err)
	return client{c, b}
}

// answered counts the clients that get their byte back; the others are lost.
func (t *trial) answered(clients []client) int {
	t.Helper()
	var first error
	served, deadline := 0, time.Now().Add(limit(10*time.Second))
	for _, c := range clients {
		c.SetReadDeadline(deadline)
		var b [1]byte
		_, err := io.ReadFull(c, b[:])
		if err == nil && b[0] != c.sent {
			err = fmt.Errorf("%d came back as %d", c.sent, b[0])
		}
		if err == nil {
			served++
		} else if first == nil {
			first = err
		}
	}
	t.lose(len(clients)-served, first)
	return served
}

// lose counts lost connections: a failure, but in a row that says so.
func (t *trial) lose(n int, err error) {
	t.Helper()
	switch {
	case n == 0:
	case t.row.loses != nil && t.row.loses(t.way) != "":
		t.excused += n
		t.Logf("%d connections are lost: %s", n, t.row.loses(t.way))
	default:
		t.lost += n
		t.Errorf("%d connections are lost; the first: %v", n, err)
	}
}

// loaded counts what a load dialled.
func (t *trial) loaded(d *load, opening bool) {
	t.Helper()
	d.end(t, opening)
	t.dialled += int(d.served.Load())
}

// A crew is members that accept and answer. A member may be in it several times.
type crew struct {
	t       *trial
	members []*Listener
	got     []atomic.Int64
	dialled int64 // at the crew's pace
	wg      sync.WaitGroup
}

// pace waits until the crew has all connections and all of it wait, if the
// dispatcher balances: it goes by who waits.
func (w *crew) pace() {
	w.t.Helper()
	ready := func() bool {
		n := int64(0)
		for i := range w.got {
			n += w.got[i].Load()
		}
		return n >= w.dialled && !slices.ContainsFunc(w.members, func(l *Listener) bool { return waiting(l) == 0 })
	}
	for begin := time.Now(); !w.t.kernel() && !ready(); time.Sleep(10 * time.Microsecond) {
		require.Less(w.t, time.Since(begin), limit(10*time.Second), "a member doesn't wait")
	}
}

// dial connects n clients at this pace.
func (w *crew) dial(a net.Addr, n int) []client {
	w.t.Helper()
	clients := make([]client, n)
	for i := range clients {
		w.pace()
		clients[i] = w.t.client(dialTest(w.t, a), byte(i))
		w.dialled++
	}
	return clients
}

// stop ends the Accepts and leaves the members open.
func (w *crew) stop() {
	for _, l := range w.members {
		l.SetDeadline(longPast)
	}
	w.wg.Wait()
	for _, l := range w.members {
		l.SetDeadline(time.Time{})
	}
}

// end waits until the clients have their answers, ends the Accepts, and returns
// how many each member got.
func (w *crew) end(clients []client) (got []int) {
	w.t.Helper()
	served, sum := w.t.answered(clients), 0
	w.stop()
	for i := range w.got {
		got = append(got, int(w.got[i].Load()))
		sum += got[i]
	}
	require.Equal(w.t, served, sum, "connections answered, and connections accepted: %v", got)
	return got
}

// accept has members accept, and returns when all of them wait.
func (t *trial) accept(ls ...*Listener) *crew {
	t.Helper()
	w := &crew{t: t, members: ls, got: make([]atomic.Int64, len(ls))}
	for i, l := range ls {
		w.wg.Add(1)
		go func() {
			defer w.wg.Done()
			for {
				c, err := l.Accept()
				if err != nil {
					if !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("accept: %v", err)
					}
					return
				}
				w.got[i].Add(1)
				go echoConn(c)
			}
		}()
	}
	t.Cleanup(w.stop)
	for _, l := range ls {
		require.Eventually(t, func() bool { return waiting(l) > 0 }, limit(5*time.Second), time.Millisecond)
	}
	return w
}

// serve has members accept what is queued, until all clients have their answers.
func (t *trial) serve(clients []client, ls ...*Listener) []int {
	t.Helper()
	return t.accept(ls...).end(clients)
}

// isSpread fails the test if a member has got less than an eighth of its share.
func (t *trial) isSpread(got []int) {
	t.Helper()
	sum := 0
	for _, n := range got {
		sum += n
	}
	require.Greater(t, slices.Min(got), sum/len(got)/8, "%v", got)
}
