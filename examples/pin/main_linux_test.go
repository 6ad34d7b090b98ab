package main

import (
	"path/filepath"
	"runtime"
	"testing"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What is pinned lets the kernel inherit.
func TestPin(t *testing.T) {
	runtime.LockOSThread() // for good: nobody else is to have its namespaces
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		t.Skip("pinning and mounting a BPF file system take root: ", err)
	}
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	dir := t.TempDir()
	path := filepath.Join(dir, "lblisten")
	require.ErrorContains(t, pin(path), "is it in a BPF file system?")
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		t.Skip("no BPF file system here: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	require.NoError(t, pin(path))
	require.ErrorContains(t, pin(path), "file exists")

	ln, err := lblisten.Listen("tcp4", "0.0.0.0:0", lblisten.WithPinnedProgram(path))
	require.NoError(t, err)
	defer ln.Close()
	require.Equal(t, "none", ln.(*lblisten.Listener).Info().OnKill.String(), "nobody else is there to inherit")
	other, err := lblisten.Listen("tcp4", ln.Addr().String(), lblisten.WithReusePort())
	require.NoError(t, err)
	defer other.Close()
	require.Equal(t, "kernel", ln.(*lblisten.Listener).Info().OnKill.String())
}
