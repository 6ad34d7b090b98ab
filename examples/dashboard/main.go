// Dashboard shows in a browser, live, what the kernel does with connections.
//
// Two worker processes with four listeners each serve one port of 127.0.0.1,
// under a steady load that the program makes itself; beside them the same with
// go-reuseport, on a port of its own. Buttons stall and close listeners, kill and
// restart workers, and send bursts. Whatever is done is done to both, and what
// becomes of each connection is counted on both ends.
//
//	go run ./examples/dashboard                        # then open http://127.0.0.1:8090
//	go run ./examples/dashboard -rate 800 -workers 3   # more of it
//	go run ./examples/dashboard -workers 1             # one process: see what a keeper does
//
// The workers hold each other's sockets (lblisten.WithHandoff), and with the button Keeper
// this program does too (lblisten.Keep): then one worker is enough. On a system that
// can't, there is one worker, and the page says so.
//
// Whoever can open the page can kill the workers, so it is served on a loopback
// address, unless -http says otherwise.
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
	"runtime"
	"syscall"
	"time"
)

type settings struct {
	http      string
	workers   int
	listeners int // of each worker
	rate      int // connections per second, to each side
	burst     int // connections
}

func parseFlags(args []string) (settings, error) {
	s := settings{burst: 2000}
	f := flag.NewFlagSet("dashboard", flag.ExitOnError)
	f.StringVar(&s.http, "http", "127.0.0.1:8090", "`address` of the page; who can reach it can kill the workers")
	f.IntVar(&s.workers, "workers", 2, "`number` of worker processes, 1 to 8")
	f.IntVar(&s.listeners, "listeners", 4, "`number` of listeners of each worker, 1 to 16")
	f.IntVar(&s.rate, "rate", 400, "connections per `second` to lblisten, and to go-reuseport, 0 to 2000")
	f.Parse(args)
	switch {
	case s.workers < 1 || s.workers > 8:
		return s, fmt.Errorf("-workers %d: ask for 1 to 8", s.workers)
	case s.listeners < 1 || s.listeners > 16:
		return s, fmt.Errorf("-listeners %d: ask for 1 to 16", s.listeners)
	case s.rate < 0 || s.rate > 2000:
		return s, fmt.Errorf("-rate %d: ask for 0 to 2000", s.rate)
	case f.NArg() > 0:
		return s, fmt.Errorf("what is %q? see -help", f.Arg(0))
	}
	return s, nil
}

func main() {
	if job, ok := os.LookupEnv(jobVariable); ok {
		os.Exit(work(job))
	}
	s, err := parseFlags(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err = run(ctx, s, func(url string) { fmt.Println("open", url, "(Ctrl-C ends it)") })
	if err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(1)
	}
}

// run runs the dashboard until the context ends, and leaves nothing behind. It
// calls ready with the address of the page.
func run(ctx context.Context, s settings, ready func(url string)) (err error) {
	// A worker dies with the thread that started it (child.DieWithParent).
	runtime.LockOSThread()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ln, err := net.Listen("tcp", s.http)
	if err != nil {
		return err
	}
	d, err := newDashboard(ctx, s)
	if err != nil {
		ln.Close()
		return err
	}
	defer func() { err = errors.Join(err, d.end()) }()

	srv := &http.Server{Handler: d.handler(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx }} // ends the event streams
	served := make(chan error, 1)
	go func() {
		served <- srv.Serve(ln)
		cancel()
	}()
	ready("http://" + ln.Addr().String())
	d.obey(ctx)
	cancel()
	srv.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
