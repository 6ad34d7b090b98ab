package lblisten

// Half-open connections: the SYN has been answered, and the client's ACK comes late, when
// the listener that the SYN met is closed. Loopback has no such clients: here the test is
// the other end of a TUN device, and all the TCP that this takes.

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const (
	tcpSYN = 1 << 1
	tcpRST = 1 << 2
	tcpPSH = 1 << 3
	tcpACK = 1 << 4
)

// lateServer is the address of this machine on the device, lateClient that of the clients.
var lateServer, lateClient = net.IPv4(10, 9, 8, 1), net.IPv4(10, 9, 8, 2)

// lateClients are clients behind a TUN device, by port.
type lateClients struct {
	t      *testing.T
	f      *os.File
	server uint16 // its port

	mu sync.Mutex
	m  map[uint16]*halfOpen
}

type halfOpen struct {
	next     uint32 // what the server sends next; 0 before its SYN
	answered bool
	reset    bool
}

func newLateClients(t *testing.T) *lateClients {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip("no TUN devices: ", err)
	}
	ifr, err := unix.NewIfreq("lblisten0")
	require.NoError(t, err)
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	require.NoError(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
	setAddress(t, "lblisten0", lateServer, 0)
	require.NoError(t, ifr.SetInet4Addr(lateClient.To4()))
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlIfreq(control, unix.SIOCSIFDSTADDR, ifr))
	require.NoError(t, unix.Close(control))
	setAddress(t, "lblisten0", nil, unix.IFF_UP)
	c := &lateClients{t: t, f: os.NewFile(uintptr(fd), "tun"), m: make(map[uint16]*halfOpen)}
	t.Cleanup(func() { c.f.Close() })
	go c.read()
	return c
}

// read takes in what the kernel sends.
func (c *lateClients) read() {
	b := make([]byte, 2048)
	for {
		n, err := c.f.Read(b)
		if err != nil {
			return
		}
		if n < 40 || b[0]>>4 != 4 || b[9] != unix.IPPROTO_TCP {
			continue
		}
		tcp := b[int(b[0]&15)*4 : n]
		c.mu.Lock()
		if h := c.m[binary.BigEndian.Uint16(tcp[2:])]; h != nil {
			flags, seq := tcp[13], binary.BigEndian.Uint32(tcp[4:])
			switch data := tcp[int(tcp[12]>>4)*4:]; {
			case flags&tcpRST != 0:
				h.reset = true
			case flags&tcpSYN != 0:
				h.next = seq + 1
			case len(data) > 0:
				h.answered = true
			}
		}
		c.mu.Unlock()
	}
}

// send sends a segment of a client.
func (c *lateClients) send(port uint16, seq, ack uint32, flags byte, data string) {
	b := make([]byte, 40, 40+len(data))
	b = append(b, data...)
	b[0], b[8], b[9] = 4<<4|5, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], lateClient.To4())
	copy(b[16:], lateServer.To4())
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:20]))
	tcp := b[20:]
	binary.BigEndian.PutUint16(tcp, port)
	binary.BigEndian.PutUint16(tcp[2:], c.server)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13] = 5<<4, flags
	binary.BigEndian.PutUint16(tcp[14:], 1<<14) // the window
	binary.BigEndian.PutUint16(tcp[16:], ^sum(uint32(sum(uint32(unix.IPPROTO_TCP+len(tcp)), b[12:20])), tcp))
	_, err := c.f.Write(b)
	require.NoError(c.t, err)
}

// sum is the sum that checksums are made of.
func sum(n uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		n += uint32(b[0]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// count is how many clients are so.
func (c *lateClients) count(is func(h *halfOpen) bool) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.m {
		if is(h) {
			n++
		}
	}
	return n
}

const lateSeq = 1000 // of each client's SYN

// begin has n clients send their SYN, and returns when all are answered.
func (c *lateClients) begin(n int) {
	c.mu.Lock()
	for i := range n {
		c.m[uint16(20000+i)] = new(halfOpen)
	}
	c.mu.Unlock()
	for i := range n {
		c.send(uint16(20000+i), lateSeq, 0, tcpSYN, "")
	}
	soon(c.t, func() bool { return c.count(func(h *halfOpen) bool { return h.next != 0 }) == n }, "SYNs aren't answered")
}

// end has all clients send their ACK and a byte, the latter again and again as TCP does,
// and returns how many are answered.
func (c *lateClients) end() int {
	isOver := func(h *halfOpen) bool { return h.answered || h.reset }
	for try := 0; try < 16 && c.count(isOver) < len(c.m); try++ {
		for port, h := range c.m {
			c.mu.Lock()
			over, next := isOver(h), h.next
			c.mu.Unlock()
			if over {
				continue
			}
			if try == 0 {
				c.send(port, lateSeq+1, next, tcpACK, "")
			}
			c.send(port, lateSeq+1, next, tcpACK|tcpPSH, "x")
		}
		for wait := 0; wait < 50 && c.count(isOver) < len(c.m); wait++ {
			time.Sleep(limit(10 * time.Millisecond))
		}
	}
	for port := range c.m {
		c.send(port, lateSeq+2, 0, tcpRST, "")
	}
	return c.count(func(h *halfOpen) bool { return h.answered })
}

// A handshake that ends after the listener that it began at is closed is served by a
// sibling: its socket is theirs, or has been closed by and by, and the kernel migrates. What
// a killed process leaves is served where Info says so.
func TestLateAck(t *testing.T) {
	for _, c := range []struct {
		name     string
		bpf      bool
		steering Steering
		wait     time.Duration
		kill     bool
		handoff  bool
		sysctl   bool // net.ipv4.tcp_migrate_req=1
	}{
		{name: "without privilege", wait: time.Second},
		{name: "with the migrating program", bpf: true, wait: time.Second},
		{name: "steered by source, the socket has retired", bpf: true, steering: SteerSource, wait: retireAfter + 3*time.Second},
		{name: "killed, without privilege", kill: true},
		{name: "killed, with the migrating program", bpf: true, kill: true},
		{name: "killed, with the sysctl", sysctl: true, kill: true},
		{name: "killed, with a handoff", wait: time.Second, kill: true, handoff: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("making a network namespace takes root")
			}
			if !rerun(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}) {
				return
			}
			if !c.bpf {
				filterBPF("EPERM")
			}
			if c.sysctl {
				needMigrateSysctl(t)
			}
			setAddress(t, "lo", nil, unix.IFF_UP)
			clients := newLateClients(t)
			job := serverJob{Network: "tcp4", Members: 2}
			opts := []Option{WithLB(), WithSteering(c.steering)}
			if c.handoff {
				job.Path = handoffPath(t)
				opts = append(opts, WithHandoff(job.Path))
			}
			g, err := ListenGroup(context.Background(), "tcp4", net.JoinHostPort(lateServer.String(), "0"), 2, opts...)
			require.NoError(t, err)
			defer g.Close()
			clients.server = uint16(g.Addr().(*net.TCPAddr).Port)
			var other *server
			if c.kill {
				job.Address = g.Addr().String()
				other = startServer(t, job)
			}
			n := count(64, 32)
			clients.begin(n)
			promised := true
			if c.kill {
				promised = other.OnKill&(InheritKernel|InheritHandoff) != 0
				other.kill()
			} else {
				require.NoError(t, g.Listeners()[0].Close())
			}
			time.Sleep(c.wait)
			var serving sync.WaitGroup
			var accepted atomic.Int64
			for _, l := range g.Listeners() {
				serving.Add(1)
				go echo(&serving, l, &accepted)
			}
			answered := clients.end()
			if promised {
				t.Logf("%d tried, %d lost", n, n-answered)
				require.Equal(t, n, answered)
			} else {
				t.Logf("%d of %d weren't served, as Info has said", n-answered, n)
			}
			if c.sysctl {
				require.True(t, promised)
				migrated := netstat(t, "TcpExt", "TCPMigrateReqSuccess")
				t.Logf("%d migrated", migrated)
				require.Positive(t, migrated)
			}
			require.NoError(t, g.Close())
			serving.Wait()
		})
	}
}

// needMigrateSysctl lets the kernel migrate in this network namespace, without a program.
func needMigrateSysctl(t *testing.T) {
	counters, err := os.ReadFile("/proc/net/netstat")
	require.NoError(t, err)
	if !strings.Contains(string(counters), "TCPMigrateReqSuccess") {
		t.Skip("this kernel doesn't migrate: it is older than 5.14")
	}
	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte("1"), 0))
}
