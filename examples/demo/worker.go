package main

// What a worker process does. It takes its orders, a line each, from its
// standard input, and ends with it: so no worker outlives its parent. Its
// standard output carries the reports, in JSON, one for each order, and between
// them a record of each connection, written when Accept has returned it and
// before it is answered. A pipe keeps what was written after its writer is
// killed.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
)

const (
	// jobVariable is the environment variable that makes a process a worker.
	// It says who makes the listeners, their address, and the path of the handoff.
	jobVariable = "LBLISTEN_DEMO_WORKER"

	byLblisten  = "lblisten"
	byReuseport = "go-reuseport"

	// recordFormat is a record of an accepted connection: listener, client port.
	recordFormat = "accepted %d %d\n"
)

// report is what a worker says of itself.
type report struct {
	Err       string // it could not do what it was told
	Addr      string
	Inherited int // connections that came through a closed listener's socket, ever
	Sockets   int
	Backlog   int // of one socket; -1: the system doesn't tell
	Balancer  lblisten.Balancer
	OnClose   lblisten.Inheritance
	OnKill    lblisten.Inheritance
	Reason    string
}

// open opens one listener. This is the line that a program changes.
func open(by, addr, path string, s settings) (net.Listener, error) {
	if by == byReuseport {
		return listenReuseport(addr)
	}
	opts := []lblisten.Option{lblisten.WithLB()}
	if s.dispatcher {
		opts = append(opts, lblisten.WithDispatcher())
	}
	if path != "" {
		opts = append(opts, lblisten.WithHandoff(path))
	}
	return lblisten.Listen("tcp", addr, opts...)
}

// worker is the state of a worker process. Its main goroutine alone uses it.
type worker struct {
	by        string
	addr      string
	path      string // of the handoff; empty without
	settings  settings
	listeners [listenersPerWorker]net.Listener
	opened    []net.Listener // all there ever were, for their counters
	accepting bool
	loops     sync.WaitGroup // one for each listener while accepting
	answering sync.WaitGroup // connections that have no answer yet
}

// work is the main function of a worker process. It returns the exit status.
func work(job string, s settings) int {
	signal.Ignore(os.Interrupt) // of the terminal; the parent decides
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	orders := make(chan string)
	go func() {
		defer close(orders)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			orders <- in.Text()
		}
	}()

	w := &worker{settings: s}
	w.by, job, _ = strings.Cut(job, " ")
	w.addr, w.path, _ = strings.Cut(job, " ")
	for i := range w.listeners {
		if err := w.open(i); err != nil {
			w.report(err)
			return 1
		}
	}
	w.report(nil)
	for {
		select {
		case <-term:
			w.stop()
			w.report(nil)
			return 0
		case order, ok := <-orders:
			if !ok {
				return 0
			}
			w.report(w.obey(order))
		}
	}
}

func (w *worker) obey(order string) error {
	i := 0
	if word, rest, ok := strings.Cut(order, " "); ok {
		order = word
		if _, err := fmt.Sscan(rest, &i); err != nil || i < 0 || i >= len(w.listeners) {
			return fmt.Errorf("there is no listener %q", rest)
		}
	}
	switch order {
	case "accept":
		w.accept()
	case "hold":
		w.hold()
	case "close":
		return w.listeners[i].Close()
	case "open":
		return w.open(i)
	case "report":
	default:
		return fmt.Errorf("there is no order %q", order)
	}
	return nil
}

// open opens listener i. The first one's address is that of all.
func (w *worker) open(i int) error {
	ln, err := open(w.by, w.addr, w.path, w.settings)
	if err != nil {
		return err
	}
	w.addr = ln.Addr().String()
	w.listeners[i] = ln
	w.opened = append(w.opened, ln)
	if w.accepting {
		w.loops.Add(1)
		go w.loop(i, ln)
	}
	return nil
}

// accept accepts on all listeners, from now on.
func (w *worker) accept() {
	if w.accepting {
		return
	}
	w.accepting = true
	for i, ln := range w.listeners {
		setDeadline(ln, time.Time{})
		w.loops.Add(1)
		go w.loop(i, ln)
	}
}

// hold stands still: when it returns, nothing is accepted any more.
func (w *worker) hold() {
	w.accepting = false
	for _, ln := range w.listeners {
		setDeadline(ln, time.Unix(1, 0))
	}
	w.loops.Wait()
}

// setDeadline fails only if the listener is closed, and then nothing accepts on
// it any more.
func setDeadline(ln net.Listener, t time.Time) {
	ln.(interface{ SetDeadline(time.Time) error }).SetDeadline(t)
}

// stop ends gracefully: no new connections, and an answer for the old ones.
func (w *worker) stop() {
	for _, ln := range w.listeners {
		ln.Close()
	}
	w.loops.Wait()
	answered := make(chan struct{})
	go func() {
		w.answering.Wait()
		close(answered)
	}()
	select {
	case <-answered:
	case <-time.After(patience / 2):
	}
}

// loop accepts until the listener is closed or told to hold.
func (w *worker) loop(i int, ln net.Listener) {
	defer w.loops.Done()
	for {
		c, err := ln.Accept()
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return
		case err != nil: // no descriptors, say: that passes
			fmt.Fprintln(os.Stderr, "demo worker:", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		// In one write, and before the answer: see above.
		fmt.Fprintf(os.Stdout, recordFormat, i, c.RemoteAddr().(*net.TCPAddr).Port)
		w.answering.Add(1)
		go w.answer(c)
	}
}

// answer sends the byte back and waits until the client goes.
func (w *worker) answer(c net.Conn) {
	defer c.Close()
	b := make([]byte, 1)
	_, err := c.Read(b)
	if err == nil {
		_, err = c.Write(b)
	}
	w.answering.Done()
	if err == nil {
		c.Read(b)
	}
}

func (w *worker) report(err error) {
	r := report{Addr: w.addr, Sockets: len(w.listeners), Backlog: -1}
	if err != nil {
		r.Err = err.Error()
	}
	for _, ln := range w.opened {
		l, ok := ln.(*lblisten.Listener)
		if !ok {
			continue // go-reuseport's says nothing of itself
		}
		info, stats := l.Info(), l.Stats()
		r.Inherited += int(stats.Inherited)
		if errors.Is(info.Reason, net.ErrClosed) {
			continue
		}
		r.Sockets, r.Backlog = info.Sockets, stats.Backlog
		r.Balancer, r.OnClose, r.OnKill = info.Balancer, info.OnClose, info.OnKill
		if info.Reason != nil {
			r.Reason = info.Reason.Error()
		}
	}
	json.NewEncoder(os.Stdout).Encode(r)
}
