package lblisten

import (
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

type addressedConn struct {
	net.Conn
	local, remote net.Addr
}

func (c addressedConn) LocalAddr() net.Addr { return c.local }

func (c addressedConn) RemoteAddr() net.Addr { return c.remote }

func flow(remote string, port int) addressedConn {
	return addressedConn{
		local:  &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80},
		remote: &net.TCPAddr{IP: net.ParseIP(remote), Port: port},
	}
}

func flowKeyOf(c net.Conn) uint64   { return flowKey(c.LocalAddr(), c.RemoteAddr()) }
func sourceKeyOf(c net.Conn) uint64 { return sourceKey(c.RemoteAddr()) }

func all(int) bool { return true }

func number(i int) uint64 { return uint64(i + 1) }

// Linux hands out even ports only to connect(2); the members must get even
// shares of these all the same.
func TestEvennessOverEvenPorts(t *testing.T) {
	for _, n := range []int{2, 3, 4, 16, 200} {
		got := make([]int, n)
		const flows = 14000
		for i := range flows {
			got[firstInRank(flowKeyOf(flow("127.0.0.1", 32768+2*i)), n, number, all)]++
		}
		chi2 := 0.0
		mean := float64(flows) / float64(n)
		for _, g := range got {
			require.Greater(t, g, int(mean/2), "%d members", n)
			chi2 += (float64(g) - mean) * (float64(g) - mean) / mean
		}
		// Wilson and Hilferty: the cube root of chi2/df is about normal. 4.75
		// standard deviations are p = 1e-6.
		df := float64(n - 1)
		z := (math.Cbrt(chi2/df) - (1 - 2/(9*df))) / math.Sqrt(2/(9*df))
		require.Less(t, z, 4.75, "%d members: chi-square %.1f", n, chi2)
	}
}

// A flow has one key, a source has one key for all its ports, and an IPv4
// address and its mapped form are one.
func TestKeys(t *testing.T) {
	require.Equal(t, flowKeyOf(flow("192.0.2.1", 7)), flowKeyOf(flow("192.0.2.1", 7)))
	require.NotEqual(t, flowKeyOf(flow("192.0.2.1", 7)), flowKeyOf(flow("192.0.2.1", 8)))
	require.Equal(t, sourceKeyOf(flow("192.0.2.1", 7)), sourceKeyOf(flow("::ffff:192.0.2.1", 8)))
	short := addressedConn{remote: &net.TCPAddr{IP: net.IP{192, 0, 2, 1}}}
	require.Equal(t, sourceKeyOf(flow("192.0.2.1", 7)), sourceKeyOf(short))
	require.NotEqual(t, sourceKeyOf(flow("192.0.2.1", 7)), sourceKeyOf(flow("192.0.2.2", 7)))
	require.NotEqual(t, sourceKeyOf(flow("2001:db8::1", 7)), sourceKeyOf(flow("2001:db8::2", 7)))
	unix := addressedConn{remote: &net.UnixAddr{}}
	require.NotEqual(t, flowKeyOf(unix), flowKeyOf(unix), "a connection without addresses goes anywhere")
}

// When a member may not be chosen, only its keys move.
func FuzzRendezvous(f *testing.F) {
	f.Add(uint64(1), uint8(4), uint8(2))
	f.Add(uint64(0), uint8(0), uint8(0))
	f.Add(uint64(math.MaxUint64), uint8(255), uint8(254))
	f.Fuzz(func(t *testing.T, key uint64, members, gone uint8) {
		n := int(members)
		first := firstInRank(key, n, number, all)
		if n == 0 {
			require.Equal(t, -1, first)
			return
		}
		require.GreaterOrEqual(t, first, 0)
		require.Less(t, first, n)
		left := int(gone) % n
		then := firstInRank(key, n, number, func(i int) bool { return i != left })
		switch {
		case n == 1:
			require.Equal(t, -1, then)
		case first != left:
			require.Equal(t, first, then, "a key of a member that stayed has moved")
		default:
			require.NotEqual(t, left, then)
		}
		// One more member takes keys, and moves none between the others.
		if more := firstInRank(key, n+1, number, all); more != n {
			require.Equal(t, first, more)
		}
	})
}

// Another process hashes the same flow to another key: who doesn't see the key
// of the hash can't choose a port by the member that it leads to.
func TestHashHasARandomKey(t *testing.T) {
	if runtime.GOOS == "js" || runtime.GOOS == "wasip1" {
		t.Skip("no processes")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	keys := make(map[string]bool)
	for range 2 {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=flowKey", "GORACE=atexit_sleep_ms=0")
		out, err := cmd.Output()
		require.NoError(t, err)
		keys[string(out)] = true
	}
	require.Len(t, keys, 2)
}

type flowOf struct{ net.Conn }

func (flowOf) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func (flowOf) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }

func flowKeyWorker() { fmt.Println(flowKeyOf(flowOf{})) }
