//go:build unix

package main

import (
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// All six cases, balanced by the kernel where it can, and by the dispatcher: every
// claim is kept, which the exit status says too.
func TestClaimsAreKept(t *testing.T) {
	for _, flags := range [][]string{nil, {"-dispatcher"}} {
		p := exampletest.Start(t, append(flags, "-conns", "400")...)
		kept := p.Hear("every claim was kept: ")
		require.True(t, p.Wait().Success())
		t.Logf("%q: %s", flags, kept)
	}
}
