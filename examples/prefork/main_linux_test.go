package main

import (
	"strconv"
	"syscall"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

// One of three processes stands still and is killed, with connections in its queue.
// Each is answered by another one, and the parent starts a third.
func TestKilledChild(t *testing.T) {
	p, addr, pids := start(t, 3)
	exampletest.Freeze(t, pids[0])
	defer syscall.Kill(pids[0], syscall.SIGKILL)
	conns := exampletest.Standing(t, addr, 90)
	require.NoError(t, syscall.Kill(pids[0], syscall.SIGKILL))
	require.NotContains(t, exampletest.Answers(t, conns), strconv.Itoa(pids[0]))
	require.NotContains(t, pids, hear(t, p))
	p.Stop(syscall.SIGTERM)
	gone(t, pids)
}
