//go:build unix

package lblisten

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// EADDRINUSE has what to do in its text, and is otherwise package net's: its types, its
// number, and the address as package net spells it.
func TestAddressInUseIsNets(t *testing.T) {
	noLeaks(t)
	wild, err := net.Listen("tcp", ":0")
	require.NoError(t, err)
	defer wild.Close()
	_, port, err := net.SplitHostPort(wild.Addr().String())
	require.NoError(t, err)
	file := socketPath(t)
	unix, err := net.Listen("unix", file)
	require.NoError(t, err)
	defer unix.Close()
	opts := []Option{WithLB(), WithDispatcher()}
	if handsOff() {
		opts = append(opts, WithHandoff(handoffPath(t)))
	}
	for _, c := range [][2]string{{"tcp", ":" + port}, {"tcp", "[::]:" + port}, {"tcp", "localhost:" + port}, {"unix", file}} {
		ln, want := net.Listen(c[0], c[1])
		if want == nil {
			require.NoError(t, ln.Close())
			continue // another family than the one that is in use
		}
		if !isAddrInUse(want) {
			t.Logf("%v isn't tried: %v", c, want)
			continue
		}
		for _, opt := range opts {
			_, err := Listen(c[0], c[1], opt)
			op, ok := err.(*net.OpError)
			require.True(t, ok, "%T", err)
			require.Equal(t, want.(*net.OpError).Addr.String(), op.Addr.String())
			require.Equal(t, want.(*net.OpError).Net, op.Net)
			call, ok := op.Err.(*os.SyscallError)
			require.True(t, ok, "%T", op.Err)
			number, ok := call.Err.(syscall.Errno)
			require.True(t, ok, "%T", call.Err)
			require.Equal(t, want.(*net.OpError).Err.(*os.SyscallError).Err, number)
			var asked *os.SyscallError
			require.True(t, errors.As(err, &asked))
			require.ErrorIs(t, err, number)
			require.Greater(t, len(err.Error()), len(want.Error())+20, "what to do is in it: %v", err)
		}
	}
}
