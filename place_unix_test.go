//go:build unix && !aix

package lblisten

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// A unix socket is the same one however its path is spelled, and another one in
// another directory. Addr is as package net's, but with a handoff, whose processes
// have directories of their own.
func TestUnixSocketInTheDirectory(t *testing.T) {
	noLeaks(t)
	path := handoffPath(t)
	before, err := os.Getwd()
	require.NoError(t, err)
	defer os.Chdir(before)
	require.NoError(t, os.Chdir(filepath.Dir(path)))
	here, err := os.Getwd()
	require.NoError(t, err)
	for _, c := range []struct {
		name, addr string
		opt        Option
	}{
		{"handed off", filepath.Join(here, "app.sock"), WithHandoff(path)},
		{"none", "app.sock", WithLB()},
	} {
		a, err := Listen("unix", "app.sock", c.opt)
		require.NoError(t, err, c.name)
		require.Equal(t, c.addr, a.Addr().String())
		for _, spelled := range []string{"app.sock", filepath.Join(here, "app.sock")} {
			b, err := Listen("unix", spelled, WithLB())
			require.NoError(t, err, "%s, %s", c.name, spelled)
			require.Equal(t, 2, a.(*Listener).Info().Members)
			require.NoError(t, b.Close())
		}
		require.NoError(t, os.Mkdir(c.name, 0o700))
		require.NoError(t, os.Chdir(c.name))
		other, err := Listen("unix", "app.sock", WithLB())
		require.NoError(t, err)
		require.Equal(t, 1, a.(*Listener).Info().Members)
		require.NoError(t, other.Close())
		require.NoError(t, os.Chdir(".."))
		require.NoError(t, a.Close())
		require.NoFileExists(t, "app.sock")
	}
}
