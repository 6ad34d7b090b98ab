package lblisten

// Addresses of other users, and one that goes.

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Another user's process can't join the group of an address, specific or not.
func TestOtherUsersCannotJoin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("being two users takes root")
	}
	noLeaks(t)
	self := executable(t)
	for _, address := range []string{"127.0.0.1:0", ":0"} {
		ln, err := Listen("tcp", address, WithRequireKernel())
		require.NoError(t, err)
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=joinThere", "LBLISTEN_TEST_ADDRESS="+ln.Addr().String(), "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, "address in use", strings.TrimSpace(string(out)))
		require.NoError(t, ln.Close())
	}
}

func joinThereWorker() {
	ln, err := Listen("tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), WithLB())
	switch {
	case err == nil:
		os.Stdout.WriteString("it joined " + ln.Addr().String())
	case isAddrInUse(err):
		os.Stdout.WriteString("address in use")
	default:
		os.Stdout.WriteString(err.Error())
	}
}

// An address that is taken away while somebody listens on it, and comes back,
// loses nothing: what waits is served, also when a member closes meanwhile, and
// new connections come as soon as it is there again.
func TestAddressComesAndGoes(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNET) {
		return
	}
	ip := net.IPv4(192, 0, 2, 77)
	inModes(t, func(t *testing.T, m mode) {
		setAddress(t, "lo:7", ip, 0)
		g, ls := newTestGroup(t, 3, "tcp", "192.0.2.77:0", m.opt)
		n := count(60, 10)
		var conns []net.Conn
		for range 2 {
			conns = append(conns, queueUp(t, g.Addr(), n)...)
			setAddress(t, "lo:7", nil, 0)
			_, err := net.DialTimeout("tcp", g.Addr().String(), 50*time.Millisecond)
			require.Error(t, err, "the address is there still")
			if len(conns) == n {
				require.NoError(t, ls[2].Close())
			}
			if m.name == "kernel" {
				_, err := ListenGroup(context.Background(), "tcp", g.Addr().String(), 3, m.opt)
				require.ErrorIs(t, err, unix.EADDRNOTAVAIL)
				require.ErrorContains(t, err, g.Addr().String())
			}
			setAddress(t, "lo:7", ip, 0)
		}
		conns = append(conns, queueUp(t, g.Addr(), n)...)
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls[:2] {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		served := answered(conns)
		d := startLoad(2, "tcp", g.Addr().String())
		require.Eventually(t, func() bool { return d.served.Load() > 50 }, limit(10*time.Second), time.Millisecond)
		d.end(t, false)
		for _, c := range conns {
			c.Close()
		}
		require.NoError(t, g.Close())
		wg.Wait()
		setAddress(t, "lo:7", nil, 0)
		t.Logf("%s: while the address was gone, %d tried, %d lost", m.name, len(conns), len(conns)-served)
		require.Equal(t, len(conns), served)
	})
}
