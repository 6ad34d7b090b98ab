//go:build unix && !aix

package main

import (
	"net/http"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// The server is replaced three times under load. No request fails.
func TestRestartUnderLoad(t *testing.T) {
	path := filepath.Join(exampletest.Dir(t), "handoff")
	p := exampletest.Start(t, "-addr", "127.0.0.1:0", "-handoff", path)
	addr := p.Hear("ready on ")
	load := exampletest.StartLoad(t, 8, "http://"+addr, func() *http.Transport { return new(http.Transport) })
	load.Await(200)
	for range 3 {
		next := exampletest.Start(t, "-addr", addr, "-handoff", path)
		next.Hear("ready on ")
		load.Await(200)
		p.Stop(syscall.SIGTERM)
		p = next
	}
	load.Await(200)
	answered, by, failed := load.End()
	t.Logf("%d requests answered, %d failed", answered, len(failed))
	require.Empty(t, failed)
	require.Len(t, by, 4)
	p.Stop(syscall.SIGTERM)
}
