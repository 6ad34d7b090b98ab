//go:build unix

// Tableflip is the server of examples/restart with tableflip, for comparison: at SIGHUP it
// starts its successor, which gets the socket, and then ends.
//
//	go run ./examples/restart -processes 1 -compare
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

// grace is how long a stopping server waits for its connections.
const grace = 15 * time.Second

func main() {
	if os.Getenv("LBLISTEN_RESTART_DRIVEN") != "" { // it ends with its standard input
		go func() {
			io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
	}
	if err := serve(os.Getenv("LBLISTEN_RESTART_ADDR")); err != nil {
		fmt.Fprintln(os.Stderr, "tableflip:", err)
		os.Exit(1)
	}
}

func serve(addr string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		return err
	}
	defer upg.Stop()
	go func() {
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		for range hangup {
			err := upg.Upgrade()
			for try := 0; err != nil && try < 100; try++ { // its own parent may not have ended yet
				time.Sleep(50 * time.Millisecond)
				err = upg.Upgrade()
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "tableflip:", err)
				os.Exit(1)
			}
		}
	}()
	ln, err := upg.Listen("tcp", addr)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(5 * time.Millisecond) // work
		fmt.Fprintln(w, os.Getpid())
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	if err := upg.Ready(); err != nil {
		return err
	}
	fmt.Printf("ready on %v, pid %d\n", ln.Addr(), os.Getpid())
	select {
	case err := <-served:
		return err
	case <-upg.Exit():
	case <-ctx.Done():
	}
	late, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := srv.Shutdown(late); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
