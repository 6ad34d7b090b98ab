package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/stats"
)

// A grpcServer answers calls, sends back what comes in a stream, and counts both
// and the connections that it has open.
type grpcServer struct {
	grpc_testing.UnimplementedTestServiceServer
	*grpc.Server
	calls, messages, open atomic.Int64
}

func newGRPCServer(opts ...grpc.ServerOption) *grpcServer {
	s := new(grpcServer)
	s.Server = grpc.NewServer(append(opts, grpc.StatsHandler(s))...)
	grpc_testing.RegisterTestServiceServer(s.Server, s)
	return s
}

func (s *grpcServer) UnaryCall(_ context.Context, r *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	s.calls.Add(1)
	return &grpc_testing.SimpleResponse{Payload: r.Payload}, nil
}

func (s *grpcServer) FullDuplexCall(stream grpc_testing.TestService_FullDuplexCallServer) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.messages.Add(1)
		if err := stream.Send(&grpc_testing.StreamingOutputCallResponse{Payload: m.Payload}); err != nil {
			return err
		}
	}
}

func (s *grpcServer) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (s *grpcServer) HandleRPC(context.Context, stats.RPCStats)                         {}
func (s *grpcServer) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (s *grpcServer) HandleConn(_ context.Context, c stats.ConnStats) {
	switch c.(type) {
	case *stats.ConnBegin:
		s.open.Add(1)
	case *stats.ConnEnd:
		s.open.Add(-1)
	}
}

func (g *group) newGRPCClient() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+g.addr(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return g.dial(ctx) }))
}

// call makes one call.
func call(conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit(20*time.Second))
	defer cancel()
	_, err := grpc_testing.NewTestServiceClient(conn).UnaryCall(ctx, new(grpc_testing.SimpleRequest))
	return err
}

// callAnew makes one call on a connection of its own.
func (g *group) callAnew() error {
	conn, err := g.newGRPCClient()
	if err != nil {
		return err
	}
	defer conn.Close()
	return call(conn)
}

// A stream sends messages and waits for each to come back, until it is stopped.
func runStream(conn *grpc.ClientConn, stop *atomic.Bool, echoed *atomic.Int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit(60*time.Second))
	defer cancel()
	stream, err := grpc_testing.NewTestServiceClient(conn).FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for n := byte(0); !stop.Load(); n++ {
		if err := stream.Send(&grpc_testing.StreamingOutputCallRequest{Payload: &grpc_testing.Payload{Body: []byte{n}}}); err != nil {
			return err
		}
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if m.Payload.Body[0] != n {
			return fmt.Errorf("message %d came back for %d", m.Payload.Body[0], n)
		}
		echoed.Add(1)
		time.Sleep(time.Millisecond) // so that the calls have the processor too
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the stream ends with %w", err)
	}
	return nil
}

// Members close under load until one is left: calls on connections of their own,
// calls on a connection that the server ends now and then, and streams on such a
// one all go on. In the end GracefulStop waits for the streams.
func TestGRPC(t *testing.T) {
	inRows(t, func(t *testing.T, g *group) {
		srv := newGRPCServer(
			grpc.KeepaliveParams(keepalive.ServerParameters{
				Time:                  time.Second, // as often as gRPC allows
				MaxConnectionAge:      100 * time.Millisecond,
				MaxConnectionAgeGrace: limit(60 * time.Second), // for the streams
			}),
			grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
		served := g.start(srv.Serve)

		conn, err := g.newGRPCClient()
		require.NoError(t, err)
		defer conn.Close()
		const streams = 4
		var echoed atomic.Int64
		var stop atomic.Bool
		ended := make(chan error, streams)
		for range streams {
			go func() { ended <- runStream(conn, &stop, &echoed) }()
		}
		require.Eventually(t, func() bool { return echoed.Load() >= streams }, limit(20*time.Second), time.Millisecond)

		var turn atomic.Int64
		l := startLoad(t, 4, func() error {
			if turn.Add(1)%2 == 0 {
				return call(conn)
			}
			return g.callAnew()
		})
		g.leave(t, l, count(60, 20))
		before := echoed.Load()
		require.Eventually(t, func() bool { return echoed.Load() >= before+streams || len(ended) > 0 }, limit(20*time.Second), time.Millisecond)
		l.end(t, g)

		stopped := make(chan error, 1)
		go func() {
			srv.GracefulStop()
			stopped <- nil
		}()
		require.Eventually(t, func() bool {
			c, err := net.Dial("tcp", g.addr())
			if err == nil {
				c.Close()
			}
			return isRefused(err)
		}, limit(20*time.Second), time.Millisecond, "it closes the listeners first")
		before = echoed.Load()
		require.Eventually(t, func() bool { return echoed.Load() >= before+streams || len(ended) > 0 }, limit(20*time.Second), time.Millisecond)
		require.Empty(t, stopped, "GracefulStop waits for the streams")
		stop.Store(true)
		for range streams {
			require.NoError(t, <-ended)
		}
		require.NoError(t, wait(t, stopped))
		require.NoError(t, wait(t, served))
		t.Logf("%d streams: %d messages sent back, %d arrived", streams, srv.messages.Load(), echoed.Load())
		require.Equal(t, echoed.Load(), srv.messages.Load())
		require.Equal(t, l.answered.Load(), srv.calls.Load())
	})
}

// Two servers on one address, and one stops under load. Its listeners close
// first and its connections are waited for, as GracefulStop itself closes a
// connection whose handshake isn't done. One connection of each client waits in
// the kernel at that moment.
func TestGRPCStopUnderLoad(t *testing.T) {
	inRows(t, func(t *testing.T, g *group) {
		if g.control() {
			t.Skip("net.Listen has no sibling that could go on")
		}
		one, two := newGRPCServer(), newGRPCServer()
		first := g.members[:len(g.members)/2]
		oneServed, twoServed := make(chan error, len(first)), make(chan error, 1)
		gate := newGate()
		for _, m := range first {
			go func() { oneServed <- one.Serve(gated{m, gate}) }()
		}
		go func() {
			twoServed <- single(g.members[len(first):]).serve(func(l net.Listener) error { return two.Serve(gated{l, gate}) })
		}()
		const clients = 8
		l := startLoad(t, clients, g.callAnew)
		l.reach(t, count(100, 20))
		gate.shut()
		require.Eventually(t, func() bool { return uint64(g.dials.Load()) == g.stats().Accepted+clients }, limit(20*time.Second), time.Millisecond)
		for _, m := range first {
			require.NoError(t, m.Close())
		}
		gate.open()
		for range first {
			require.ErrorIs(t, wait(t, oneServed), net.ErrClosed)
		}
		l.reach(t, count(20, 5))
		l.end(t, g)
		require.Equal(t, l.sent.Load(), g.dials.Load(), "gRPC redials what was lost")
		require.Eventually(t, func() bool { return one.open.Load() == 0 }, limit(20*time.Second), time.Millisecond)
		one.GracefulStop()
		two.GracefulStop()
		require.NoError(t, wait(t, twoServed))
		require.NotZero(t, one.calls.Load())
		require.NotZero(t, two.calls.Load())
		require.Equal(t, l.answered.Load(), one.calls.Load()+two.calls.Load())
	})
}
