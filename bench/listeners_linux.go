package main

// The contenders: lblisten, package net, other packages, and accept4 itself. It
// knows how each of them is opened, and nothing of what is measured.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
	kavu "github.com/kavu/go_reuseport"
	"github.com/lblisten/lblisten"
	goreuse "github.com/libp2p/go-reuseport"
	fasthttp "github.com/valyala/fasthttp/reuseport"
	"golang.org/x/sys/unix"
)

// contender is one way to get connections.
type contender struct {
	name string // in tables
	open func(n int) (*opened, error)
}

// opened is n listeners of one address. One listener may be there n times: then
// its n accept loops share it.
type opened struct {
	addr  *net.TCPAddr
	lns   []net.Listener
	also  []func()
	rawFD int // in place of lns, for accept4 itself; else -1
}

func (o *opened) close() {
	for _, ln := range o.lns {
		ln.Close()
	}
	for _, f := range o.also {
		f()
	}
	if o.rawFD >= 0 {
		unix.Close(o.rawFD)
	}
}

func (o *opened) sockaddr() *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: o.addr.Port, Addr: [4]byte(o.addr.IP.To4())}
}

// ownSockets tells whether each listener has a socket of its own.
func (o *opened) ownSockets() bool {
	if len(o.lns) < 2 {
		return true
	}
	for i, ln := range o.lns {
		if slices.Contains(o.lns[:i], ln) {
			return false
		}
	}
	l, ok := o.lns[0].(*lblisten.Listener)
	return !ok || l.Info().Balancer == lblisten.BalancerKernel
}

const anyPort = "127.0.0.1:0"

// The names in tables.
const (
	nameNet        = "net.Listen"
	nameMPTCP      = "net.Listen, MPTCP"
	nameGoReuse    = "go-reuseport"
	nameFasthttp   = "fasthttp/reuseport"
	nameKavu       = "kavu/go_reuseport"
	nameTableflip  = "tableflip"
	nameLean       = "lean, by hand"
	nameRaw        = "raw accept4 (floor)"
	nameLB         = "lblisten"
	nameDispatcher = "lblisten, dispatcher"
	nameHandoff    = "lblisten, received"
	nameLoad       = "lblisten, SteerLoad"
	namePeer       = "lblisten, handoff of 2"
	nameNetWaits   = "net.Listen, waits for more"
	nameReuseOf2   = "go-reuseport, 2 processes, waits for more"
	nameKept       = "lblisten, keeper"
)

// contenders has them by name, for processes of the suite's own too.
var contenders = map[string]contender{}

func init() {
	for _, c := range []contender{
		{nameNet, one(func() (net.Listener, error) { return net.Listen("tcp", anyPort) })},
		{nameMPTCP, one(listenMPTCP)},
		{nameGoReuse, each(func(addr string) (net.Listener, error) { return goreuse.Listen("tcp", addr) })},
		{nameFasthttp, each(func(addr string) (net.Listener, error) { return fasthttp.Listen("tcp4", addr) })},
		{nameKavu, each(func(addr string) (net.Listener, error) { return kavu.Listen("tcp4", addr) })},
		{nameTableflip, one(listenTableflip)},
		{nameLean, each(listenLean)},
		{nameRaw, openRaw},
		{nameLB, group(lblisten.WithRequireKernel())},
		{nameDispatcher, group(lblisten.WithDispatcher())},
		{nameLoad, group(lblisten.WithRequireKernel(), lblisten.WithSteering(lblisten.SteerLoad))},
		{nameHandoff, openReceived},
		{namePeer, besides("peer")},
		{nameReuseOf2, waiting(reuseOf2)},
		{nameNetWaits, waiting(one(func() (net.Listener, error) { return net.Listen("tcp", anyPort) }))},
		{nameKept, besides("keeper")},
	} {
		contenders[c.name] = c
	}
}

// each opens n listeners of one address by a func that opens one.
func each(listen func(addr string) (net.Listener, error)) func(int) (*opened, error) {
	return func(n int) (*opened, error) {
		o := &opened{rawFD: -1}
		addr := anyPort
		for range n {
			ln, err := listen(addr)
			if err != nil {
				o.close()
				return nil, err
			}
			addr = ln.Addr().String()
			o.lns = append(o.lns, ln)
		}
		o.addr = o.lns[0].Addr().(*net.TCPAddr)
		return o, nil
	}
}

// one opens one listener, which n accept loops share.
func one(listen func() (net.Listener, error)) func(int) (*opened, error) {
	return func(n int) (*opened, error) {
		ln, err := listen()
		if err != nil {
			return nil, err
		}
		o := &opened{rawFD: -1, addr: ln.Addr().(*net.TCPAddr)}
		for range n {
			o.lns = append(o.lns, ln)
		}
		return o, nil
	}
}

func group(opts ...lblisten.Option) func(int) (*opened, error) {
	return func(n int) (*opened, error) {
		g, err := lblisten.ListenGroup(context.Background(), "tcp", anyPort, n, opts...)
		if err != nil {
			return nil, err
		}
		o := &opened{rawFD: -1, addr: g.Addr().(*net.TCPAddr), also: []func(){func() { g.Close() }}}
		for _, l := range g.Listeners() {
			o.lns = append(o.lns, l)
		}
		return o, nil
	}
}

// listenMPTCP is what net.Listen is in programs whose go.mod says go 1.24 or
// later; this module's says less, so that nameNet is plain TCP.
func listenMPTCP() (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(true)
	return lc.Listen(context.Background(), "tcp", anyPort)
}

// listenLean is what one can write by hand to get lblisten's cheap accept: what
// net sets on each accepted socket is set once on the listening one, from which
// Linux copies it.
func listenLean(addr string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var errs []error
		err := c.Control(func(fd uintptr) {
			for _, o := range []struct{ level, name, value int }{
				{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
				{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
				{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
			} {
				errs = append(errs, unix.SetsockoptInt(int(fd), o.level, o.name, o.value))
			}
		})
		return errors.Join(append(errs, err)...)
	}}
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", addr)
}

// upgrader is tableflip's, of which a process can have one.
var upgrader = sync.OnceValues(func() (*tableflip.Upgrader, error) { return tableflip.New(tableflip.Options{}) })

func listenTableflip() (net.Listener, error) {
	u, err := upgrader()
	if err != nil {
		return nil, err
	}
	// tableflip knows listeners by the address that was asked for: ask for a new one.
	probe, err := net.Listen("tcp", anyPort)
	if err != nil {
		return nil, err
	}
	addr := probe.Addr().String()
	probe.Close()
	return u.Listen("tcp", addr)
}

func openRaw(int) (*opened, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	o := &opened{rawFD: fd}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		o.close()
		return nil, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, 1<<15); err != nil { // the kernel cuts it to its maximum, as it does net's
		o.close()
		return nil, os.NewSyscallError("listen", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		o.close()
		return nil, os.NewSyscallError("getsockname", err)
	}
	o.addr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: sa.(*unix.SockaddrInet4).Port}
	return o, nil
}

// openReceived listens on a socket that another process has opened.
func openReceived(n int) (o *opened, err error) {
	if n != 1 {
		return nil, errors.New("one socket is received")
	}
	for range 3 { // this process may notice the death late, and open a socket
		if o, err = receive(); err == nil {
			return o, nil
		}
	}
	return nil, err
}

// receive kills a process that listens and adopts its socket. A connection that
// was queued there proves it.
func receive() (_ *opened, err error) {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return nil, err
	}
	o := &opened{rawFD: -1, also: []func(){func() { os.RemoveAll(dir) }}}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	path := filepath.Join(dir, "handoff")
	// A member on another address makes this process one of the handoff.
	keeper, err := lblisten.Listen("tcp", anyPort, lblisten.WithHandoff(path))
	if err != nil {
		return nil, err
	}
	o.also = append(o.also, func() { keeper.Close() })
	p, err := start("handoff", path)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	if o.addr, err = net.ResolveTCPAddr("tcp", p.hello); err != nil {
		return nil, err
	}
	client, err := net.DialTimeout("tcp", p.hello, 5*time.Second)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if err := awaitSocket(o.addr); err != nil {
		return nil, err
	}
	p.kill()
	time.Sleep(100 * time.Millisecond) // it shows nowhere outside that the death was noticed
	ln, err := lblisten.Listen("tcp", p.hello, lblisten.WithHandoff(path))
	if err != nil {
		return nil, err
	}
	o.lns = []net.Listener{ln}
	l := ln.(*lblisten.Listener)
	l.SetDeadline(time.Now().Add(5 * time.Second))
	c, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("the connection that was queued in the killed process's socket: %w", err)
	}
	c.Close()
	l.SetDeadline(time.Time{})
	if s := l.Info().Sockets; s != 1 {
		return nil, fmt.Errorf("%d sockets where one was to be adopted", s)
	}
	return o, nil
}

// besides opens a group with a handoff, beside a process that has a role in it.
func besides(role string) func(int) (*opened, error) {
	return func(n int) (_ *opened, err error) {
		dir, err := os.MkdirTemp("", "lblisten-bench")
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, "handoff")
		o, err := group(lblisten.WithHandoff(path))(n)
		if err != nil {
			os.RemoveAll(dir)
			return nil, err
		}
		o.also = append(o.also, func() { os.RemoveAll(dir) })
		p, err := start(role, path, o.addr.String())
		if err != nil {
			o.close()
			return nil, err
		}
		o.also = append([]func(){p.stop}, o.also...)
		for end := time.Now().Add(5 * time.Second); o.lns[0].(*lblisten.Listener).Info().OnKill&lblisten.InheritHandoff == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				o.close()
				return nil, errors.New("nobody holds the sockets")
			}
		}
		return o, nil
	}
}

// waiting has the process wait for another listener too, on which nothing comes: as a
// process of a handoff waits for the others, and a server in use for its connections.
func waiting(open func(int) (*opened, error)) func(int) (*opened, error) {
	return func(n int) (*opened, error) {
		other, err := net.Listen("tcp", anyPort)
		if err != nil {
			return nil, err
		}
		go other.Accept()
		o, err := open(n)
		if err != nil {
			other.Close()
			return nil, err
		}
		o.also = append(o.also, func() { other.Close() })
		return o, nil
	}
}

// reuseOf2 opens what another process opens too, by go-reuseport.
func reuseOf2(n int) (*opened, error) {
	o, err := contenders[nameGoReuse].open(n)
	if err != nil {
		return nil, err
	}
	p, err := start("peer", "", o.addr.String())
	if err != nil {
		o.close()
		return nil, err
	}
	o.also = append(o.also, p.stop)
	return o, nil
}

// serveKeeper is that process as a keeper.
func serveKeeper(p *childSide) error {
	ctx, stop := context.WithCancel(context.Background())
	kept := make(chan error, 1)
	go func() { kept <- lblisten.Keep(ctx, p.args[0]) }()
	p.say("keeps")
	p.awaitEnd()
	stop()
	return <-kept
}

// servePeer is the other process as one that accepts on the address, too: with a
// handoff, or by go-reuseport without a path.
func servePeer(p *childSide) error {
	path, addr := p.args[0], p.args[1]
	var ln net.Listener
	var err error
	if path != "" {
		ln, err = lblisten.Listen("tcp", addr, lblisten.WithHandoff(path))
	} else {
		ln, err = goreuse.Listen("tcp", addr)
	}
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	p.say("listens")
	p.awaitEnd()
	return ln.Close()
}

// serveHandoff is the process that is killed.
func serveHandoff(p *childSide) error {
	ln, err := lblisten.Listen("tcp", anyPort, lblisten.WithHandoff(p.args[0]))
	if err != nil {
		return err
	}
	defer ln.Close()
	p.say(ln.Addr().String())
	p.awaitEnd()
	return nil
}

// awaitSocket waits until this process holds a socket bound to an address. Before
// that, the death of the process that opened it would lose it.
func awaitSocket(addr *net.TCPAddr) error {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return err
		}
		for _, e := range entries {
			fd, _ := strconv.Atoi(e.Name())
			sa, err := unix.Getsockname(fd)
			if in, ok := sa.(*unix.SockaddrInet4); err == nil && ok && in.Port == addr.Port {
				return nil
			}
		}
	}
	return fmt.Errorf("no duplicate of the socket of %v has come", addr)
}

// queued is how many connections wait in a listener's own socket.
func queued(ln net.Listener) (n int, err error) {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("%T has no socket", ln)
	}
	c, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	e := c.Control(func(fd uintptr) { n, err = queuedFD(int(fd)) })
	return n, errors.Join(e, err)
}

// queuedFD reads it from TCP_INFO, where it has the place of tcpi_unacked.
func queuedFD(fd int) (int, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, os.NewSyscallError("getsockopt TCP_INFO", err)
	}
	return int(info.Unacked), nil
}

// maxQueue is the longest queue that the kernel allows.
func maxQueue() int {
	b, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	if err == nil {
		if n, err := strconv.Atoi(string(b[:max(0, len(b)-1)])); err == nil {
			return n
		}
	}
	return 128
}
