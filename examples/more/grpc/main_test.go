//go:build unix && !aix

package main

import (
	"context"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// check calls on a channel, one call after the other, until stop. One that doesn't
// stay opens a channel for each call.
func check(addr string, stays bool, stop *atomic.Bool, calls *atomic.Int64) error {
	var cc *grpc.ClientConn
	defer func() {
		if cc != nil {
			cc.Close()
		}
	}()
	for !stop.Load() {
		if cc == nil {
			var err error
			if cc, err = grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
				return err
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), exampletest.Limit(20*time.Second))
		_, err := grpc_health_v1.NewHealthClient(cc).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		cancel()
		if err != nil {
			return err
		}
		calls.Add(1)
		if !stays {
			cc.Close()
			cc = nil
		}
	}
	return nil
}

// The server is replaced three times while calls come in, on channels that stay and
// on new ones. No call fails.
func TestRestartUnderLoad(t *testing.T) {
	path := filepath.Join(exampletest.Dir(t), "handoff")
	p := exampletest.Start(t, "-addr", "127.0.0.1:0", "-handoff", path)
	addr := p.Hear("ready on ")

	var stop atomic.Bool
	var calls atomic.Int64
	const clients = 8
	failed := make(chan error, clients)
	for i := range clients {
		go func() { failed <- check(addr, i%2 == 0, &stop, &calls) }()
	}
	reach := func(n int64) {
		require.Eventually(t, func() bool { return calls.Load() >= n || len(failed) > 0 }, exampletest.Limit(60*time.Second), time.Millisecond)
	}
	reach(200)
	for range 3 {
		next := exampletest.Start(t, "-addr", addr, "-handoff", path)
		next.Hear("ready on ")
		reach(calls.Load() + 200)
		p.Stop(syscall.SIGTERM)
		p = next
	}
	reach(calls.Load() + 200)
	stop.Store(true)
	for range clients {
		require.NoError(t, <-failed)
	}
	t.Logf("%d calls, none failed", calls.Load())
	p.Stop(syscall.SIGTERM)
}
