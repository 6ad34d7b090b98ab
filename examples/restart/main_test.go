//go:build unix

package main

import (
	"runtime"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// In each order, and with one server, no request fails where none is to, which the exit
// status says.
func TestRestarts(t *testing.T) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	for _, args := range [][]string{{"-order", newFirst}, {"-order", oldFirst}, {"-processes", "1"}} {
		p := exampletest.Start(t, append(args, "-restarts", "3", "-clients", "16")...)
		require.True(t, p.Wait().Success(), "%v", p.Said())
		t.Log(p.Said())
	}
}
