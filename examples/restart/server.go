package main

// The server. This is what to copy.

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

const (
	// listeners is the number of accept loops of a server.
	listeners = 4

	// grace is how long a stopping server waits for its connections. TimeoutStopSec of the
	// systemd unit is longer.
	grace = 15 * time.Second

	// What a server says on its standard output, a line each: its address, as soon
	// as it listens, and who takes over if it dies, whenever that changes.
	readyLine = "ready on "
	heirsLine = "who takes over if this process dies: "
)

// listenAndServe serves in the way that the environment tells.
func listenAndServe(addr string) error {
	switch path := os.Getenv(handoffVariable); os.Getenv(wayVariable) {
	case "net":
		return serveNet(addr)
	case "systemd":
		return serve(addr, lblisten.WithSystemd())
	case "alone":
		return serve(addr)
	default:
		return serve(addr, lblisten.WithHandoff(path))
	}
}

// serve serves until SIGTERM or an interrupt.
func serve(addr string, opts ...lblisten.Option) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// When ListenGroup returns, this server and the others hold each other's sockets,
	// so that another one may go. (If one doesn't answer, it goes on without that one
	// after a second.)
	g, err := lblisten.ListenGroup(ctx, "tcp", addr, listeners, opts...)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	fmt.Println(readyLine + g.Addr().String())
	go sayHeirs(ctx, g)
	return lbhttp.Serve(ctx, g, srv, grace)
}

var handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	time.Sleep(5 * time.Millisecond) // work
	fmt.Fprintln(w, os.Getpid())
})

// sayHeirs says who would take over, whenever that changes.
func sayHeirs(ctx context.Context, g *lblisten.Group) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for heirs := lblisten.Inheritance(-1); ctx.Err() == nil; {
		if now := g.Info().OnKill; now != heirs {
			heirs = now
			fmt.Println(heirsLine + heirs.String())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// serveNet is what most programs do.
func serveNet(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println(readyLine + ln.Addr().String())
	srv := &http.Server{Handler: handler}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	return srv.Shutdown(ctx)
}
