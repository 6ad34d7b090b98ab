package lbhttp

import (
	"context"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/internal/standin"
	"github.com/stretchr/testify/require"
)

// A service of one process, which a stand-in for systemd stops and starts under load:
// no request fails.
func TestOneProcess(t *testing.T) {
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	service, err := standin.New(dir, 8)
	require.NoError(t, err)
	t.Cleanup(func() {
		service.Close()
		os.RemoveAll(dir)
	})
	j := job{Addr: "127.0.0.1:0", Takes: 2 * time.Millisecond, Grace: limit(10 * time.Second)}
	p := startProcess(t, (*exec.Cmd).Start, j) // for a port
	j.Addr, j.Systemd = p.addr, true
	p.stop()
	p = startProcess(t, service.Start, j)
	require.Eventually(t, func() bool { return len(service.Said()) == 1 && service.Said()[0] == "READY=1" }, limit(5*time.Second), time.Millisecond)
	d := startLoad(t, j.Addr, 4, false, false)
	var longest atomic.Int64
	n := count(20, 3)
	for range n {
		time.Sleep(limit(30 * time.Millisecond))
		begin := time.Now()
		p.stop()
		p = startProcess(t, service.Start, j)
		longest.Store(max(longest.Load(), int64(time.Since(begin))))
	}
	d.end()
	p.stop()
	require.Equal(t, []string{"READY=1", "STOPPING=1"}, service.Said()[2*n:])
	require.Len(t, service.Names(), 2)
	t.Logf("%d restarts, of which the longest took %v", n, time.Duration(longest.Load()).Round(time.Millisecond))
}

// Who has no certificate isn't ready.
func TestIsNotReady(t *testing.T) {
	dir, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify"})
	require.NoError(t, err)
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", dir+"/notify")
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2)
	require.NoError(t, err)
	require.ErrorIs(t, ServeTLS(context.Background(), g, newQuiet(), dir+"/cert", dir+"/key", time.Second), os.ErrNotExist)
	systemd.SetDeadline(time.Now().Add(-time.Second))
	_, err = systemd.Read(make([]byte, 100))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
}

// A NOTIFY_SOCKET that nobody reads ends no service.
func TestNobodyIsToldThatItIsReady(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	r := start(t, "127.0.0.1:0", newQuiet(), limit(5*time.Second))
	get(t, newClient(t, nil, false), "http://"+r.addr+"/default")
	require.NoError(t, r.stop())
}
