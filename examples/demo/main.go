// Demo counts what is lost when a listener goes away.
//
// Two worker processes listen on one port of 127.0.0.1, with four listeners
// each. Round after round a burst of clients connects, each sends a byte and
// waits until it comes back. In the middle of it something goes away:
//
//   - one listener closes, and its siblings live on;
//   - one worker is stopped gracefully (SIGTERM): it closes its listeners and
//     answers what it accepted;
//   - one worker is killed (SIGKILL).
//
// Each of them happens while the workers accept, and while they stand still,
// so that all connections wait in the kernel's queues.
//
// A client counts as lost if it got neither an answer nor a refusal at connect,
// and no Accept had returned its connection. Connections that a killed worker
// had accepted already have died with the process, and are counted apart, from
// records that a worker writes into a pipe before it answers.
//
// The workers hold each other's sockets (lblisten.WithHandoff), so that what
// waits for a worker that is stopped or killed is taken over by the other one.
// That takes no privilege. Without it (-handoff=false) the kernel resets what
// waits, unless it lets another process inherit.
//
//	go run ./examples/demo                  # some seconds
//	go run ./examples/demo -compare         # the same with go-reuseport beside it
//	go run ./examples/demo -dispatcher      # both workers accept from one socket
//	go run ./examples/demo -handoff=false   # each worker has its own sockets only
//	go run ./examples/demo -json            # for programs
//
// The exit status is 0 if every claim of the package was kept and every client
// is accounted for, 1 if not, and 2 for a wrong flag.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/child"
)

// settings are the flags. A worker gets the same command line as its parent,
// and so the same settings.
type settings struct {
	rounds     int
	conns      int
	dispatcher bool
	handoff    bool
	compare    bool
	json       bool
}

func parseFlags() (settings, error) {
	var s settings
	flag.IntVar(&s.rounds, "rounds", 6, "`number` of rounds, 1 to 1000; there are six cases, one a round")
	flag.IntVar(&s.conns, "conns", 2000, "`number` of connections in a round, 1 to 20000")
	flag.BoolVar(&s.dispatcher, "dispatcher", false, "let the package balance in the process, as it does where the kernel can't")
	flag.BoolVar(&s.handoff, "handoff", true, "let the workers hold each other's sockets, where the system can")
	flag.BoolVar(&s.compare, "compare", false, "run the same rounds with go-reuseport too")
	flag.BoolVar(&s.json, "json", false, "print the result as one JSON object")
	flag.Parse()
	switch {
	case s.rounds < 1 || s.rounds > 1000:
		return s, fmt.Errorf("-rounds %d: ask for 1 to 1000", s.rounds)
	case s.conns < 1 || s.conns > 20000:
		return s, fmt.Errorf("-conns %d: ask for 1 to 20000", s.conns)
	case flag.NArg() > 0:
		return s, fmt.Errorf("what is %q? see -help", flag.Arg(0))
	}
	return s, nil
}

func main() {
	s, err := parseFlags()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	if job, ok := os.LookupEnv(jobVariable); ok {
		os.Exit(work(job, s))
	}
	runtime.LockOSThread() // a worker dies with the thread that started it (child.DieWithParent)
	kept, err := demo(s)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	if err != nil || !kept {
		os.Exit(1)
	}
}

// demo runs the rounds and prints what came of them. It returns true if every
// claim was kept and every client is accounted for.
func demo(s settings) (kept bool, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.rounds+1)*30*time.Second)
	defer cancel()

	var progress io.Writer = os.Stdout
	if s.json {
		progress = os.Stderr
	}
	e := &experiment{settings: s, progress: progress}
	if limit := child.FileLimit() - spareFiles; s.conns > limit {
		e.conns = max(limit, 1)
		fmt.Fprintf(progress, "note: %d connections in a round instead of %d, because of the limit of open files\n", e.conns, s.conns)
	}

	if s.handoff {
		dir, err := os.MkdirTemp("", "lblisten-demo-")
		if err != nil {
			return false, err
		}
		defer os.RemoveAll(dir)
		if e.path, err = tryHandoff(filepath.Join(dir, "handoff")); err != nil {
			return false, err
		}
		if e.path == "" {
			fmt.Fprintln(progress, "note: no handoff between processes, because this system can't")
		}
	}

	ours, err := e.run(ctx, byLblisten)
	if err != nil {
		return false, explain(ctx, err)
	}
	results := []*result{ours}
	if s.compare {
		var theirs *result
		if theirs, err = e.run(ctx, byReuseport); err != nil {
			err = explain(ctx, err) // our own results are still worth something
		} else {
			results = append(results, theirs)
		}
	}

	v := judge(results)
	if s.json {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return v.Kept, errors.Join(err, enc.Encode(v))
	}
	printVerdict(os.Stdout, v)
	return v.Kept, err
}

// tryHandoff returns the path if listeners can hand off by it, and "" if this
// system can't at all.
func tryHandoff(path string) (string, error) {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithHandoff(path))
	switch {
	case errors.Is(err, lblisten.ErrUnsupported):
		return "", nil
	case err != nil:
		return "", err
	}
	return path, ln.Close()
}

// explain says in plain words that a context has ended the demo.
func explain(ctx context.Context, err error) error {
	switch ctx.Err() {
	case context.Canceled:
		return errors.New("interrupted")
	case context.DeadlineExceeded:
		return fmt.Errorf("out of time: %w", err)
	}
	return err
}
