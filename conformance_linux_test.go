package lblisten

// Scenarios of the conformance suite that are Linux's: half-open connections,
// shutdown(2) of a listening socket, and steering, by the package and by
// programs of the user's own.

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	cbpf "golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// halfOpen dials n clients whose handshakes stay half-open, SYN_RECV, until
// finish: they are connected, and their listener waits for data.
func (t *trial) halfOpen(l *Listener, n int) []client {
	t.Helper()
	for _, c := range socketsAt(l) {
		require.NoError(t, onFD(c, func(fd uintptr) error { return deferAccept(int(fd)) }))
	}
	before, clients := queuedAt(l), make([]client, n)
	for i := range clients {
		clients[i] = client{dialTest(t, l.Addr()), byte(i)}
	}
	require.Equal(t, before, queuedAt(l), "they aren't half-open")
	return clients
}

// deferAccept lets handshakes take half a minute at the most.
func deferAccept(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30)
}

// finish has half-open clients send their byte.
func (t *trial) finish(clients []client) []client {
	t.Helper()
	for i, c := range clients {
		clients[i] = t.client(c.Conn, c.sent)
	}
	return clients
}

// attach puts a program of the user's own in force for the group.
func attach(t testing.TB, l *Listener, program ...cbpf.Instruction) {
	t.Helper()
	raw, err := cbpf.Assemble(program)
	require.NoError(t, err)
	code := make([]unix.SockFilter, len(raw))
	for i, in := range raw {
		code[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	needPrograms(t)
	require.NoError(t, onDescriptor(l, func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]})
	}))
}

// shutDown is migrate_reuseport's other way to end a socket. What waits for it
// is reset at once if the kernel doesn't inherit; a handoff keeps sockets open,
// but this shuts down every process's duplicate.
func shutDown(halfOpen bool) func(t *trial) {
	return func(t *trial) {
		t.onlyKernel()
		ls := t.group(2)
		var clients []client
		if halfOpen {
			clients = t.halfOpen(ls[0], 24)
		} else {
			clients = t.dial(ls[0].Addr(), 24)
		}
		require.NoError(t, onDescriptor(ls[0], func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }))
		_, err := ls[0].Accept()
		require.ErrorIs(t, err, unix.EINVAL)
		require.NoError(t, ls[0].Close())
		if halfOpen {
			t.finish(clients)
		}
		t.serve(clients, ls[1])
	}
}

func onlyKernelInherits(w *way) string {
	if w.inherits {
		return ""
	}
	return "the user has shut the socket down, and the kernel doesn't inherit"
}

func init() {
	cpu := []cbpf.Instruction{cbpf.LoadExtension{Num: cbpf.ExtCPUID}, cbpf.RetA{}}
	conformance = append(conformance, []scenario{
		{name: "half-open connections when members close", do: func(t *trial) {
			ls := t.group(4)
			clients := t.halfOpen(ls[0], 36)
			for _, l := range ls[:3] {
				require.NoError(t, l.Close())
			}
			t.serve(t.finish(clients), ls[3])
		}},
		{name: "half-open connections when a member is replaced", do: func(t *trial) {
			ls := t.group(2)
			clients := t.halfOpen(ls[0], 24)
			require.NoError(t, ls[0].Close())
			l := t.join(ls[1])
			require.NoError(t, ls[1].Close())
			t.serve(t.finish(clients), l)
		}},
		{name: "half-open and established connections, and a blocked heir", do: func(t *trial) {
			ls := t.group(2)
			w := t.accept(ls[1])
			half := t.halfOpen(ls[0], 24)
			clients := t.dial(ls[0].Addr(), 24)
			require.NoError(t, ls[0].Close())
			w.end(append(clients, t.finish(half)...))
		}},
		{name: "half-open connections when another process is killed", do: func(t *trial) {
			t.only(t.handoff, "by the kernel alone: see TestHalfOpenConnectionsMigrate")
			ls := t.group(2)
			s := t.process(ls[0], false)
			eachPooled(t.path, func(fd int) { deferAccept(fd) }) // the other's too: a duplicate will do
			clients := t.halfOpen(ls[0], 36)
			s.kill()
			require.Eventually(t, func() bool { return !t.kernel() || ls[0].Info().Sockets == 2+2 }, limit(5*time.Second), time.Millisecond)
			t.serve(t.finish(clients), ls...)
		}},
		{name: "a member's socket is shut down", loses: onlyKernelInherits, do: shutDown(false)},
		{name: "a member's socket is shut down, with half-open connections", loses: onlyKernelInherits, do: shutDown(true)},
		{name: "sources stay at their members, and all members have some", do: func(t *trial) {
			t.only(t.kernel() && !t.handoff, "see TestSteerSource, and for a handoff the row of one source")
			t.needSteering(SteerSource)
			ls := t.group(4, WithSteering(SteerSource))
			w := t.accept(ls...)
			before, used := make([]int64, 4), make([]bool, 4)
			for host := range 32 {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(host+1))}}
				for range 3 {
					c, err := d.Dial("tcp", ls[0].Addr().String())
					require.NoError(t, err)
					c.(*net.TCPConn).SetLinger(0)
					t.answered([]client{t.client(c, 1)})
					c.Close()
				}
				changed := 0
				for i := range w.got {
					if n := w.got[i].Load(); n != before[i] {
						changed, before[i], used[i] = changed+1, n, true
					}
				}
				require.Equal(t, 1, changed, "members that got connections of one source")
			}
			require.NotContains(t, used, false)
		}},
		{name: "connections go to the member of their CPU", do: func(t *trial) {
			t.onlyKernel()
			t.needSteering(SteerCPU)
			ls := t.group(runtime.NumCPU(), WithSteering(SteerCPU))
			onEachCPU(t, ls, func(l *Listener) (cpu int) {
				require.NoError(t, onDescriptor(l, func(fd int) (err error) {
					cpu, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU)
					return err
				}))
				return cpu
			})
		}},
		{name: "the user's program goes by the CPU", do: func(t *trial) {
			t.onlyKernel()
			ls := t.group(runtime.NumCPU())
			attach(t, ls[0], cpu...)
			onEachCPU(t, ls, func(l *Listener) int { return slices.Index(ls, l) })
		}},
		{name: "the user's program goes by the NUMA node", do: func(t *trial) {
			t.onlyKernel()
			ls := t.group(2)
			program, err := numaProgram()
			t.only(err == nil, fmt.Sprint("loading it takes a privilege: ", err))
			defer unix.Close(program)
			require.NoError(t, onDescriptor(ls[0], func(fd int) error { return attachProgram(fd, program) }))
			_, err = os.Stat("/sys/devices/system/node/node1")
			clients := t.dial(ls[0].Addr(), 24)
			if os.IsNotExist(err) {
				require.Equal(t, []int{24, 0}, t.serve(clients, ls...), "there is node 0 only")
				clients = t.dial(ls[0].Addr(), 24)
			}
			require.NoError(t, ls[0].Close())
			t.serve(clients, ls[1])
		}},
		{name: "the user's program names a member that isn't there", do: func(t *trial) {
			t.onlyKernel()
			ls := t.group(4)
			attach(t, ls[0], cbpf.RetConstant{Val: 99})
			w := t.accept(ls...)
			t.isSpread(w.end(w.dial(ls[0].Addr(), 128))) // by the kernel's hash
		}},
		{name: "the user's program names a member that has closed", do: func(t *trial) {
			t.onlyKernel()
			ls := t.group(3)
			attach(t, ls[0], cbpf.RetConstant{Val: 1})
			clients := t.dial(ls[0].Addr(), 24)
			require.NoError(t, ls[1].Close())
			clients = append(clients, t.dial(ls[0].Addr(), 24)...)
			t.serve(clients, ls[0], ls[2])
		}},
		{name: "two addresses of the loopback network share a port", do: func(t *trial) {
			a := t.group(2)
			b := t.listen("tcp", at("127.0.0.2", a[0]).String(), 2)
			wa, wb := t.accept(a...), t.accept(b...)
			ca, cb := t.dial(a[0].Addr(), 24), t.dial(b[0].Addr(), 40)
			wa.end(ca)
			wb.end(cb)
		}},
		{name: "IPv6 sockets dial mapped addresses", do: func(t *trial) {
			endpoints[3].need(t)
			for _, address := range []string{"127.0.0.1:0", ":0"} {
				ls := t.listen("tcp", address, 3)
				var clients []client
				for i := range 24 {
					clients = append(clients, t.client(dialMapped(t, ls[0].Addr()), byte(i)))
				}
				clients = append(clients, t.dial(ls[0].Addr(), 12)...)
				require.NoError(t, ls[0].Close())
				t.serve(clients, ls[1:]...)
			}
		}},
		{name: "an abstract unix socket", do: func(t *trial) {
			t.only(!t.kernel(), "the kernel balances TCP only")
			ls := t.listen("unix", fmt.Sprintf("@lblisten-conformance-%d", os.Getpid()), 3)
			clients := t.dial(ls[0].Addr(), 24)
			require.NoError(t, ls[0].Close())
			t.serve(clients, ls[1:]...)
		}},
	}...)
}

// dialMapped dials ::ffff:127.0.0.1, which package net takes for an IPv4 address.
func dialMapped(t *trial, a net.Addr) net.Conn {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	f := os.NewFile(uintptr(fd), "mapped")
	defer f.Close()
	to := &unix.SockaddrInet6{Port: a.(*net.TCPAddr).Port, Addr: [16]byte(net.IPv4(127, 0, 0, 1).To16())}
	require.NoError(t, connect(fd, to))
	c, err := net.FileConn(f)
	require.NoError(t, err)
	require.NoError(t, c.(*net.TCPConn).SetLinger(0))
	t.Cleanup(func() { c.Close() })
	return c
}

// onEachCPU dials from each CPU that this process may use, and wants every
// connection at the member of that CPU.
func onEachCPU(t *trial, ls []*Listener, cpuOf func(*Listener) int) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	require.NoError(t, unix.SchedGetaffinity(0, &all))
	defer unix.SchedSetaffinity(0, &all)
	for _, l := range ls {
		if !all.IsSet(cpuOf(l)) {
			continue
		}
		var set unix.CPUSet
		set.Set(cpuOf(l))
		require.NoError(t, unix.SchedSetaffinity(0, &set))
		for range 12 { // by the system call itself: package net may move to another thread
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			t.dialled++
			require.NoError(t, connect(fd, sockaddr(l.Addr())))
			acceptWithin(t, l).Close()
			unix.Close(fd)
		}
	}
}

// numaProgram loads reuseport_bpf_numa's: the index is the node that the program
// runs on.
func numaProgram() (int, error) {
	code := [][8]byte{{0x85, 4: 42}, {0x95}} // call bpf_get_numa_node_id, exit
	attr := struct {
		progType, insnCount uint32
		insns, license      uint64
		keep                [][8]byte // not for the kernel: see heap
	}{progType: unix.BPF_PROG_TYPE_SOCKET_FILTER, insnCount: 2, insns: heap(&code[0]), license: heap(&license[0]), keep: code}
	return bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Offsetof(attr.keep))
}
