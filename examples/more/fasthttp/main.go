// Fasthttp serves with github.com/valyala/fasthttp over four accept loops, and is
// restarted without failing a request: start the next one with the same address and
// path, and stop this one.
//
//	go run ./fasthttp -handoff /run/user/$UID/lblisten-fasthttp
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/valyala/fasthttp"
)

// leaveTime is how long clients that are busy on a connection have to hear that it
// ends, and stopTime how long requests have to end.
const (
	leaveTime = 250 * time.Millisecond
	stopTime  = 10 * time.Second
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`address` to listen on")
	n := flag.Int("n", 4, "number of accept loops")
	handoff := flag.String("handoff", "", "`directory` of the handoff, the same in all processes; default: none")
	flag.Parse()
	opt := lblisten.WithLB()
	if *handoff != "" {
		opt = lblisten.WithHandoff(*handoff)
	}
	if err := serve(*addr, *n, opt); err != nil {
		fmt.Fprintln(os.Stderr, "fasthttp:", err)
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
	var stopping atomic.Bool
	srv := &fasthttp.Server{
		Handler: func(ctx *fasthttp.RequestCtx) {
			if stopping.Load() {
				ctx.SetConnectionClose() // so that a busy client goes to another process
			}
			fmt.Fprintln(ctx, os.Getpid())
		},
		ReadTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(srv.Serve) }()
	fmt.Println("ready on", g.Addr())

	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program at once

	// First the listeners: another process takes over what is queued, and what comes.
	// Then the server. It closes the listeners once more, which is an error to it
	// but not to us. A connection that has said nothing yet has 5 s for its request.
	g.Close()
	<-served // no Accept returns any more
	stopping.Store(true)
	time.Sleep(leaveTime)
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if err := srv.ShutdownWithContext(ctx); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("shutting down: %w", err)
	}
	return nil
}
