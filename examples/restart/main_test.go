//go:build unix

package main

import (
	"runtime"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// In each order no request fails, which the exit status says.
func TestRestarts(t *testing.T) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	for _, order := range []string{newFirst, oldFirst, stopStart} {
		p := exampletest.Start(t, "-order", order, "-restarts", "3", "-clients", "16")
		require.True(t, p.Wait().Success())
		t.Log(p.Said())
	}
}
