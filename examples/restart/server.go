package main

// The server. This is what to copy.

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
)

const (
	// listeners is the number of accept loops of a server.
	listeners = 4

	// leaveTime is how long a stopping server waits for clients that are busy on a
	// connection that they keep: with their next answer they hear that it ends.
	leaveTime = 250 * time.Millisecond

	// answerTime is how long it then waits at most until the connections that it
	// has accepted are answered, and shutdownTime what it has to end after that.
	// TimeoutStopSec of the systemd unit is longer than all of them.
	answerTime   = 10 * time.Second
	shutdownTime = 5 * time.Second

	// What a server says on its standard output, a line each: its address, as soon
	// as it listens, and who takes over if it dies, whenever that changes.
	readyLine = "ready on "
	heirsLine = "who takes over if this process dies: "
)

// serve serves until SIGTERM or an interrupt.
func serve(addr, path string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// When ListenGroup returns, this server and the others hold each other's sockets,
	// so that another one may go. (If one doesn't answer, it goes on without that one
	// after a second: awaitStop tells.)
	g, err := lblisten.ListenGroup(ctx, "tcp", addr, listeners, lblisten.WithHandoff(path))
	if err != nil {
		return err
	}
	var stopping atomic.Bool
	unanswered := &connections{open: make(map[net.Conn]bool)}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if stopping.Load() {
				w.Header().Set("Connection", "close") // so that a busy client moves to another server
			}
			time.Sleep(5 * time.Millisecond) // work
			fmt.Fprintln(w, os.Getpid())
		}),
		ConnState:         unanswered.note,
		ReadHeaderTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(srv.Serve) }()

	fmt.Println(readyLine + g.Addr().String())
	if err := tellSystemd("READY=1"); err != nil {
		fmt.Fprintln(os.Stderr, "restart: telling systemd:", err)
	}
	if err := awaitStop(ctx, g, served); err != nil {
		return err
	}
	stop() // a second signal ends the program at once

	// First the listeners: what is queued there, and what still comes, goes
	// to the other servers. http.Server.Shutdown would close them too, but it also
	// closes connections that it has accepted and not read the first request of.
	g.Close()
	<-served // no Accept returns any more: unanswered has them all
	stopping.Store(true)
	time.Sleep(leaveTime)
	if n := unanswered.wait(answerTime); n > 0 {
		fmt.Fprintf(os.Stderr, "restart: stopping although %d connections have no answer after %v\n", n, answerTime)
	}
	// Only idle connections are left. Their clients have to expect that they are
	// closed at any time, and repeat a request that meets with it.
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		srv.Close()
		return fmt.Errorf("shutting down: %w", err)
	}
	return nil
}

// awaitStop returns when the server is to stop, or with the error by which it
// can't go on. Meanwhile it says who would take over.
func awaitStop(ctx context.Context, g *lblisten.Group, served <-chan error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for heirs := lblisten.Inheritance(-1); ; {
		if now := g.Info().OnKill; now != heirs {
			heirs = now
			fmt.Println(heirsLine + heirs.String())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		case err := <-served:
			return err
		}
	}
}

// connections are those that wait for an answer: new ones, whose request has not
// been read yet, and active ones.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]bool // guarded by mu
}

// note is for http.Server.ConnState.
func (cs *connections) note(c net.Conn, state http.ConnState) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive:
		cs.open[c] = true
	default: // idle, closed or hijacked
		delete(cs.open, c)
	}
}

// wait waits until there are none, and returns how many there are still when the
// time is over.
func (cs *connections) wait(most time.Duration) int {
	for deadline := time.Now().Add(most); ; time.Sleep(10 * time.Millisecond) {
		cs.mu.Lock()
		n := len(cs.open)
		cs.mu.Unlock()
		if n == 0 || time.Now().After(deadline) {
			return n
		}
	}
}

// tellSystemd says something to systemd if it has started this process with
// Type=notify. (What sd_notify does, without the library.)
func tellSystemd(what string) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(what))
	return err
}
