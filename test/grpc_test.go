// Package test tries the package with servers that are too heavy to be a
// dependency of it.
package test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/stats"
)

// check makes one call on a connection of its own.
func check(address string) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

// ended counts the connections that a server is done with.
type ended struct{ atomic.Int64 }

func (e *ended) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (e *ended) HandleRPC(context.Context, stats.RPCStats)                         {}
func (e *ended) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (e *ended) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnEnd); ok {
		e.Add(1)
	}
}

// A gRPC server needs no other change than the listener. One of two on an
// address stops under load, and every call is answered. Its listeners close
// first: GracefulStop itself closes a connection whose handshake isn't done.
func TestGRPC(t *testing.T) {
	for name, opt := range map[string]lblisten.Option{"default": lblisten.WithLB(), "dispatcher": lblisten.WithDispatcher()} {
		t.Run(name, func(t *testing.T) {
			serve := func(address string, e *ended) (*lblisten.Group, *grpc.Server, <-chan error) {
				g, err := lblisten.ListenGroup(context.Background(), "tcp", address, 4, opt)
				require.NoError(t, err)
				s := grpc.NewServer(grpc.StatsHandler(e))
				grpc_health_v1.RegisterHealthServer(s, health.NewServer())
				served := make(chan error, 1)
				go func() { served <- g.Serve(s.Serve) }()
				return g, s, served
			}
			var done ended
			a, one, oneServed := serve("127.0.0.1:0", &done)
			b, two, twoServed := serve(a.Addr().String(), new(ended))

			var calls atomic.Int64
			var stop atomic.Bool
			failed := make(chan error, 4)
			for range 4 {
				go func() {
					var err error
					for !stop.Load() && err == nil {
						err = check(a.Addr().String())
						calls.Add(1)
					}
					failed <- err
				}()
			}
			reach := func(n int64) {
				require.Eventually(t, func() bool { return calls.Load() >= n || len(failed) > 0 }, 30*time.Second, time.Millisecond)
			}
			reach(200)
			require.NoError(t, a.Close())
			require.ErrorIs(t, <-oneServed, net.ErrClosed)
			require.Eventually(t, func() bool { return uint64(done.Load()) == a.Stats().Accepted }, 20*time.Second, time.Millisecond)
			one.GracefulStop()
			reach(calls.Load() + 200)
			stop.Store(true)
			for range 4 {
				require.NoError(t, <-failed)
			}
			require.NotZero(t, a.Stats().Accepted)
			require.NotZero(t, b.Stats().Accepted)
			t.Logf("%d calls, each on a connection of its own, none failed", calls.Load())
			two.GracefulStop()
			require.NoError(t, <-twoServed)
		})
	}
}
