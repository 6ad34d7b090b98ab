// Grpc is a gRPC server of four accept loops that is restarted without failing a
// call: start the next one with the same address and path, and stop this one.
//
//	go run ./grpc -handoff /run/user/$UID/lblisten-grpc
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// handshakeTime is what a client has to say its first words. GracefulStop waits for
// that; the default is two minutes. stopTime is what calls have to end.
const (
	handshakeTime = 5 * time.Second
	stopTime      = 20 * time.Second
)

func main() {
	addr := flag.String("addr", "127.0.0.1:50051", "`address` to listen on")
	n := flag.Int("n", 4, "number of accept loops")
	handoff := flag.String("handoff", "", "`directory` of the handoff, the same in all processes; default: none")
	flag.Parse()
	opt := lblisten.WithLB()
	if *handoff != "" {
		opt = lblisten.WithHandoff(*handoff)
	}
	if err := serve(*addr, *n, opt); err != nil {
		fmt.Fprintln(os.Stderr, "grpc:", err)
		os.Exit(1)
	}
}

func serve(addr string, n int, opt lblisten.Option) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	g, err := lblisten.ListenGroup(ctx, "tcp", addr, n, opt)
	if err != nil {
		return err
	}
	srv := grpc.NewServer(grpc.ConnectionTimeout(handshakeTime))
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer()) // and your own services

	var fresh sync.WaitGroup // connections that the server hasn't begun with
	served := make(chan error, 1)
	go func() {
		served <- g.Serve(func(ln net.Listener) error { return srv.Serve(&listener{ln, &fresh}) })
	}()
	fmt.Println("ready on", g.Addr())

	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program at once

	// First the listeners: another process takes over what is queued, and what comes.
	// Then the server, when it has begun with all it has accepted: GracefulStop
	// closes a connection that it hasn't.
	g.Close()
	<-served // no Accept returns any more
	fresh.Wait()
	kill := time.AfterFunc(stopTime, srv.Stop) // a stream may last for ever
	defer kill.Stop()
	srv.GracefulStop() // clients with open connections go to another process
	return nil
}

// A listener counts the connections that nobody has read from or closed yet.
type listener struct {
	net.Listener
	fresh *sync.WaitGroup
}

func (l *listener) Accept() (net.Conn, error) {
	l.fresh.Add(1)
	c, err := l.Listener.Accept()
	if err != nil {
		l.fresh.Done()
		return nil, err
	}
	return &conn{c, sync.OnceFunc(l.fresh.Done)}, nil
}

type conn struct {
	net.Conn
	begun func()
}

func (c *conn) Read(b []byte) (int, error) {
	c.begun()
	return c.Conn.Read(b)
}

func (c *conn) Close() error {
	c.begun()
	return c.Conn.Close()
}
