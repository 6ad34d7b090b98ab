package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
)

// dir returns a path for a handoff.
func dir(t *testing.T) string {
	t.Helper()
	switch runtime.GOOS {
	case "windows", "plan9", "js", "wasip1", "aix":
		t.Skipf("no handoff on %s", runtime.GOOS)
	}
	parent, err := os.MkdirTemp("", "lb")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(parent) })
	return filepath.Join(parent, "handoff")
}

func check(t *testing.T, path string) (code int, text string) {
	t.Helper()
	var out bytes.Buffer
	return run(context.Background(), []string{"-check", path}, &out, &out), out.String()
}

// What is kept stays when its process has closed; -check tells, and the next process
// gets what was queued.
func TestKeepAndCheck(t *testing.T) {
	path := dir(t)
	code, text := check(t, path)
	require.Equal(t, 1, code)
	require.Contains(t, text, "no such file or directory")

	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan int)
	var log bytes.Buffer
	go func() { ended <- run(ctx, []string{"-log", "debug", "-for", "1h", path}, &log, &log) }()
	require.Eventually(t, func() bool { code, _ := check(t, path); return code == 0 }, 5*time.Second, time.Millisecond)
	ln, err := lblisten.Listen("tcp4", "127.0.0.1:0", lblisten.WithHandoff(path)) // in this process: it has the keeper's link
	require.NoError(t, err)
	code, text = check(t, path)
	require.Equal(t, 0, code, text)
	require.Contains(t, text, "keeper")
	require.Regexp(t, `tcp4 `+ln.Addr().String()+` +tcp4 +\d+ +1 +`, text)
	require.NoError(t, ln.Close())
	code, text = check(t, path)
	require.Equal(t, 1, code, text)
	require.Contains(t, text, "no process listens there")
	ln, err = lblisten.Listen("tcp4", ln.Addr().String(), lblisten.WithHandoff(path))
	require.NoError(t, err)
	code, text = check(t, path)
	require.Equal(t, 0, code, text)
	stop()
	require.Equal(t, 0, <-ended)
	require.NoError(t, ln.Close())
	require.Contains(t, log.String(), "this process keeps the sockets of the handoff")
}

// Bad usage is 2, with what is wrong.
func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "usage: lbkeep"},
		{[]string{"a", "b"}, 2, "usage: lbkeep"},
		{[]string{"-for", "-1s", "/x"}, 2, "can't be negative"},
		{[]string{"-log", "loud", "/x"}, 2, "loud"},
		{[]string{"-x"}, 2, "-x"},
	} {
		var out bytes.Buffer
		require.Equal(t, c.code, run(context.Background(), c.args, &out, &out))
		require.Contains(t, out.String(), c.want)
	}
	var out bytes.Buffer
	require.Equal(t, 1, run(context.Background(), []string{"relative"}, &out, &out))
}
