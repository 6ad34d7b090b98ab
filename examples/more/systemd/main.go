//go:build linux

// Systemd serves on a socket that systemd has opened (socket activation), with four
// accept loops. systemd keeps the socket when the service stops or crashes, and what
// comes meanwhile waits in it for the next one; so a restart loses nothing.
//
// lblisten.service and lblisten.socket say how to install it. Without systemd:
//
//	go build -o lblisten-systemd ./systemd
//	systemd-socket-activate -l 127.0.0.1:8080 ./lblisten-systemd
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/lblisten/lblisten"
)

// leaveTime is how long clients that are busy on a connection have to hear that it
// ends, answerTime how long a stopping server then waits for its open connections,
// and shutdownTime how long for its idle ones. TimeoutStopSec of the unit is longer.
const (
	leaveTime    = 250 * time.Millisecond
	answerTime   = 10 * time.Second
	shutdownTime = 5 * time.Second
)

func main() {
	n := flag.Int("n", 4, "number of accept loops")
	flag.Parse()
	if err := serve(*n); err != nil {
		fmt.Fprintln(os.Stderr, "systemd:", err)
		os.Exit(1)
	}
}

func serve(n int) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	sockets, err := activation.Listeners()
	if err != nil {
		return err
	}
	if len(sockets) != 1 || sockets[0] == nil {
		return fmt.Errorf("%d sockets from systemd, want one that listens", len(sockets))
	}
	// The dispatcher: there is one socket, and all accept loops take from it. It
	// hands nothing to one that is busy.
	g, err := lblisten.Dispatch(sockets[0], n)
	if err != nil {
		return err
	}

	var stopping atomic.Bool
	var waiting sync.Map // connections that have not been answered
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if stopping.Load() {
				w.Header().Set("Connection", "close")
			}
			fmt.Fprintln(w, os.Getpid())
		}),
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew, http.StateActive:
				waiting.Store(c, true)
			default: // idle, closed or hijacked
				waiting.Delete(c)
			}
		},
		ReadHeaderTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(srv.Serve) }()
	fmt.Println("ready on", g.Addr())
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return err
	}

	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program at once
	if _, err := daemon.SdNotify(false, daemon.SdNotifyStopping); err != nil {
		fmt.Fprintln(os.Stderr, "systemd:", err)
	}

	// First the listeners: what is queued stays in systemd's socket. Then what has been
	// accepted, then the server.
	g.Close()
	<-served // no Accept returns any more
	stopping.Store(true)
	time.Sleep(leaveTime)
	for deadline := time.Now().Add(answerTime); time.Now().Before(deadline) && !isEmpty(&waiting); {
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("shutting down: %w", err), srv.Close())
	}
	return nil
}

func isEmpty(m *sync.Map) bool {
	empty := true
	m.Range(func(any, any) bool {
		empty = false
		return false
	})
	return empty
}
