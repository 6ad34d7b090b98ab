package lblisten

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

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
func (flowOf) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }

func init() { workers["flowKey"] = func() { fmt.Println(flowKey(flowOf{})) } }
