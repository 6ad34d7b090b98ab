//go:build unix

package main

import (
	"context"
	"net/http"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

// The only process is stopped and then started, with a keeper, under load: no request fails.
func TestRestartWithKeeper(t *testing.T) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	path := filepath.Join(exampletest.Dir(t), "handoff")
	ctx, stop := context.WithCancel(context.Background())
	kept := make(chan error)
	go func() { kept <- lblisten.Keep(ctx, path) }()
	addr := "127.0.0.1:" + strconv.Itoa(exampletest.Port(t))
	start := func() *exampletest.Process {
		p := exampletest.Start(t, "-addr", addr, "-handoff", path)
		p.Hear("ready")
		return p
	}
	p := start()
	load := exampletest.StartLoad(t, 8, "http://"+addr, func() *http.Transport { return new(http.Transport) })
	for range 5 {
		load.Await(20)
		p.Stop(syscall.SIGTERM)
		time.Sleep(exampletest.Limit(20 * time.Millisecond))
		p = start()
	}
	load.Await(20)
	answered, by, failed := load.End()
	t.Logf("%d requests answered, %d failed, by %d processes", answered, len(failed), len(by))
	require.Empty(t, failed)
	require.Len(t, by, 6)
	p.Stop(syscall.SIGTERM)
	stop()
	require.NoError(t, <-kept)
}
