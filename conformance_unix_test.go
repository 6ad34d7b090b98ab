//go:build unix && !aix

package lblisten

// Scenarios of the conformance suite with several processes, and with what
// programs do to descriptors.

import (
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lblisten/lblisten/internal/joining"
)

// process starts another process with two members on the address of a listener;
// where there is a handoff each has the other's sockets when it returns.
func (t *trial) process(l *Listener, accept bool) *server {
	t.Helper()
	t.only(t.kernel() || t.handoff, "the dispatcher's socket belongs to one process, without a handoff")
	s := startServer(t, serverJob{Path: t.path, Address: l.Addr().String(), Members: 2, Dispatcher: !t.kernel(), Accept: accept})
	if t.handoff {
		s.becomes(isHandedOff)
		soon(t, func() bool { return l.Info().OnKill&InheritHandoff != 0 }, "it isn't handed off")
	}
	return s
}

// noHeir is why a process that goes away may lose what is queued for it.
func noHeir(w *way) string {
	if w.inherits || w.handoff {
		return ""
	}
	return "without privilege and without a handoff nobody inherits from a process"
}

// otherProcess has another process go away while connections wait.
func otherProcess(end func(s *server)) func(t *trial) {
	return func(t *trial) {
		ls := t.group(2)
		s := t.process(ls[0], false)
		clients := t.dial(ls[0].Addr(), 48)
		end(s)
		s.wait()
		t.serve(clients, ls...)
	}
}

func init() {
	conformance = append(conformance, []scenario{
		{name: "two processes share an address", do: func(t *trial) {
			ls := t.group(2)
			s := t.process(ls[0], true)
			w := t.accept(ls...)
			t.answered(t.dial(ls[0].Addr(), 128))
			here, there := int(w.got[0].Load()+w.got[1].Load()), s.ask("report").Accepted
			require.Equal(t, 128, here+there)
			if t.kernel() {
				t.isSpread([]int{here, there})
			}
		}},
		{name: "another process closes", loses: noHeir, do: otherProcess(func(s *server) { s.ask("close"); s.in.Close() })},
		{name: "another process is terminated", loses: noHeir, do: otherProcess(func(s *server) { s.signal(syscall.SIGTERM) })},
		{name: "another process is killed", loses: noHeir, do: otherProcess(func(s *server) { s.signal(syscall.SIGKILL) })},
		{name: "this process's last member closes, another process lives", loses: noHeir, do: func(t *trial) {
			ls := t.group(2)
			s := t.process(ls[0], false)
			clients := t.dial(ls[0].Addr(), 48)
			require.NoError(t, ls[1].Close())
			require.NoError(t, ls[0].Close())
			s.ask("accept")
			require.Equal(t, t.answered(clients), s.ask("report").Accepted)
		}},
		{name: "three other processes go one by one", loses: noHeir, do: func(t *trial) {
			ls := t.group(1)
			servers := []*server{t.process(ls[0], false), t.process(ls[0], false), t.process(ls[0], false)}
			clients := t.dial(ls[0].Addr(), 48)
			servers[1].kill()
			if t.handoff {
				servers[0].becomes(isHandedOff)
			}
			servers[0].close()
			servers[2].kill()
			t.serve(clients, ls[0])
		}},
		{name: "a process is replaced, the new one first", loses: noHeir, do: func(t *trial) {
			ls := t.group(1)
			old := t.process(ls[0], false)
			clients := t.dial(ls[0].Addr(), 24)
			next := t.process(ls[0], true)
			clients = append(clients, t.dial(ls[0].Addr(), 24)...)
			old.close()
			w := t.accept(ls[0])
			require.Equal(t, t.answered(clients), int(w.got[0].Load())+next.ask("report").Accepted)
		}},
		{name: "a process is replaced, the old one goes first", loses: noHeir, do: func(t *trial) {
			ls := t.group(1)
			old := t.process(ls[0], false)
			clients := t.dial(ls[0].Addr(), 24)
			old.close()
			clients = append(clients, t.dial(ls[0].Addr(), 24)...)
			next := t.process(ls[0], true)
			w := t.accept(ls[0])
			require.Equal(t, t.answered(clients), int(w.got[0].Load())+next.ask("report").Accepted)
		}},
		{name: "a process is killed while clients dial", do: func(t *trial) {
			t.only(t.handoff, "the kernel's own migration has a race, see TestTwentyKillsUnderContinuousDials")
			ls := t.group(2)
			s := t.process(ls[0], false)
			d := startLoad(32, "tcp", ls[0].Addr().String()) // so that some wait here, whatever the hash
			require.Eventually(t, func() bool { return queuedAt(ls[0]) != 0 || runtime.GOOS != "linux" }, limit(5*time.Second), time.Millisecond)
			w := t.accept(ls...)
			s.kill()
			before := d.served.Load()
			require.Eventually(t, func() bool { return d.served.Load() > before+50 || d.failed.Load() > 0 }, limit(10*time.Second), time.Millisecond)
			t.loaded(d, false)
			w.stop()
		}},
		{name: "clients are gone or reset when a process is killed", loses: noHeir, do: func(t *trial) {
			ls := t.group(2)
			s := t.process(ls[0], false)
			var clients []client
			for range 16 {
				clients = append(clients, t.dial(ls[0].Addr(), 1)...)
				dialTest(t, ls[0].Addr()).Close() // by a reset
				require.NoError(t, dialTest(t, ls[0].Addr()).(*net.TCPConn).CloseWrite())
			}
			s.kill()
			t.accept(ls...)
			t.answered(clients)
		}},
		{name: "a second process without a handoff is refused, and told why", do: func(t *trial) {
			t.only(!t.kernel() && !t.handoff, "the address can be shared")
			ls := t.group(1)
			s := beginServer(t, serverJob{Address: ls[0].Addr().String(), Dispatcher: true})
			s.hear()
			require.Contains(t, s.Err, "can't be shared between processes without WithHandoff")
			t.serve(t.dial(ls[0].Addr(), 4), ls[0])
		}},
		{name: "listen(2) again on a member's descriptor", do: func(t *trial) {
			ls := t.group(4)
			c, err := ls[1].SyscallConn()
			require.NoError(t, err)
			clients := t.dial(ls[0].Addr(), 32)
			for range 2 {
				require.NoError(t, c.Control(func(fd uintptr) { err = unix.Listen(int(fd), 64) }))
				require.NoError(t, err)
			}
			w := t.accept(ls...)
			t.isSpread(w.end(append(clients, w.dial(ls[0].Addr(), 96)...)))
		}},
		{name: "a socket is bound to the address and doesn't listen", do: func(t *trial) {
			t.only(!joining.Refuses(), "it would get its share, which is refused")
			ls := t.group(2)
			fd, err := boundSocket(ls[0].Addr())
			if !t.kernel() {
				require.ErrorIs(t, err, unix.EADDRINUSE)
				return
			}
			require.NoError(t, err)
			defer unix.Close(fd)
			l := t.join(ls[0])
			w := t.accept(append(ls, l)...)
			t.isSpread(w.end(w.dial(l.Addr(), 96)))
		}},
		{name: "a connection goes out from the address", do: func(t *trial) {
			t.onlyKernel()
			t.only(runtime.GOOS == "linux", "elsewhere such a socket may not connect")
			ls := t.group(2)
			far := t.group(1)
			fd, err := boundSocket(ls[0].Addr())
			require.NoError(t, err)
			defer unix.Close(fd)
			require.NoError(t, connect(fd, sockaddr(far[0].Addr())))
			require.Equal(t, ls[0].Addr().String(), acceptWithin(t, far[0]).RemoteAddr().String())
			w := t.accept(ls...)
			t.isSpread(w.end(w.dial(ls[0].Addr(), 96)))
		}},
		{name: "a duplicate of a descriptor outlives its member", do: func(t *trial) {
			ls := t.group(2)
			f, err := ls[0].File()
			require.NoError(t, err)
			defer f.Close()
			clients := t.dial(ls[0].Addr(), 24)
			require.NoError(t, ls[0].Close())
			t.serve(append(clients, t.dial(ls[1].Addr(), 24)...), ls[1])
		}},
		{name: "a unix socket's process is killed", do: func(t *trial) {
			t.only(!t.kernel() && t.handoff, "several processes on a unix socket take the dispatcher and a handoff")
			path := socketPath(t)
			ls := t.listen("unix", path, 2)
			s := startServer(t, serverJob{Path: t.path, Network: "unix", Address: path, Members: 2})
			s.becomes(isHandedOff)
			clients := t.dial(ls[0].Addr(), 24)
			s.kill()
			require.NoError(t, ls[0].Close())
			t.serve(append(clients, t.dial(ls[1].Addr(), 12)...), ls[1])
		}},
	}...)
}

func sockaddr(a net.Addr) *unix.SockaddrInet4 {
	tcp := a.(*net.TCPAddr)
	return &unix.SockaddrInet4{Port: tcp.Port, Addr: [4]byte(tcp.IP.To4())}
}

// boundSocket binds a socket, which would balance, to an address.
func boundSocket(a net.Addr) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != nil {
		return -1, err
	}
	joinsKernel(uintptr(fd))
	if err = unix.Bind(fd, sockaddr(a)); err != nil {
		unix.Close(fd)
	}
	return fd, os.NewSyscallError("bind", err)
}
