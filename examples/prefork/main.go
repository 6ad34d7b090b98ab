//go:build unix

// Prefork serves with several processes. The parent only starts them, and starts
// another one when one dies: it has no socket, and no connection goes through it.
// The processes listen on the address themselves, and take over each other's queued
// connections when one of them goes.
//
//	go build -o prefork ./examples/prefork && ./prefork -n 4
//	curl http://127.0.0.1:8080
//	kill -HUP PARENT      # restarts one after the other, with a new program if there is one
//	kill -TERM PARENT     # stops all
//
// With -handoff, and a directory that stays, the parent can be replaced as well:
// start another one, wait until it is ready, and stop the old one.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

// childVariable has the directory of the handoff in the children.
const childVariable = "PREFORK_HANDOFF"

const (
	stopTime  = 10 * time.Second  // what a child has to stop; then it is killed
	crashTime = time.Second       // one that dies sooner is started again after that
	ready     = "ready: process " // what a child says when it listens
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`address` to listen on")
	n := flag.Int("n", 4, "number of processes")
	path := flag.String("handoff", "", "`directory` of the handoff; default: a new one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if handoff := os.Getenv(childVariable); handoff != "" {
		err = child(ctx, *addr, handoff)
	} else {
		err = parent(ctx, *n, *path)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prefork:", err)
		os.Exit(1)
	}
}

func parent(ctx context.Context, n int, path string) error {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	if path == "" {
		dir, err := os.MkdirTemp("", "prefork-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		path = filepath.Join(dir, "handoff")
	}

	places := make([]place, n)
	var all sync.WaitGroup
	for i := range places {
		places[i] = place{restart: make(chan bool), ready: make(chan bool, 1)}
		all.Add(1)
		go func() {
			defer all.Done()
			places[i].keep(ctx, path)
		}()
	}
	for ctx.Err() == nil {
		select {
		case <-hangup:
			for i := range places {
				places[i].replace(ctx)
			}
		case <-ctx.Done():
		}
	}
	all.Wait() // SIGTERM: keep has passed it on
	return nil
}

// A place is filled by one process after the other.
type place struct {
	restart chan bool
	ready   chan bool // a process is; buffered
}

// replace stops the process, and returns when the next one listens. The others
// serve meanwhile.
func (p *place) replace(ctx context.Context) {
	select {
	case <-p.ready: // of the one that goes
	default:
	}
	for _, c := range []chan bool{p.restart, p.ready} {
		select {
		case <-c:
		case <-ctx.Done():
		}
	}
}

// keep keeps a process running until ctx is done.
func (p *place) keep(ctx context.Context, path string) {
	for ctx.Err() == nil {
		begin := time.Now()
		childCtx, stop := context.WithCancel(ctx)
		go func() {
			select {
			case p.restart <- true:
				stop()
			case <-childCtx.Done():
			}
		}()
		err := p.run(childCtx, path)
		crashed := childCtx.Err() == nil
		stop()
		if crashed {
			fmt.Printf("a process has ended (%v), another one starts\n", err)
			if time.Since(begin) < crashTime {
				time.Sleep(crashTime)
			}
		}
	}
}

// run runs a process until it ends, or tells it to when ctx is done.
func (p *place) run(ctx context.Context, path string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), childVariable+"="+path)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopTime
	if _, err := cmd.StdinPipe(); err != nil { // closed with the parent, however it ends
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for in := bufio.NewScanner(out); in.Scan(); {
		fmt.Println(in.Text())
		if strings.HasPrefix(in.Text(), ready) {
			select {
			case p.ready <- true:
			default:
			}
		}
	}
	return cmd.Wait()
}

// child serves until ctx is done or the parent has gone.
func child(ctx context.Context, addr, path string) error {
	ctx, stop := context.WithCancel(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	signal.Ignore(syscall.SIGHUP) // a terminal sends it to the children as well

	g, err := lblisten.ListenGroup(ctx, "tcp", addr, 1, lblisten.WithHandoff(path))
	if err != nil {
		return err
	}
	fmt.Printf("%s%d on %v\n", ready, os.Getpid(), g.Addr())
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, os.Getpid())
	})}
	return lbhttp.Serve(ctx, g, srv, stopTime/2)
}
