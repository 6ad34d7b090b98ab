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
	"sync/atomic"
	"time"

	"github.com/lblisten/lblisten"
)

const (
	// jobVariable is the environment variable that makes a process a worker.
	jobVariable = "LBLISTEN_DASHBOARD_WORKER"

	byLblisten  = "lblisten"
	byReuseport = "go-reuseport"

	modeKernel     = "kernel"
	modeDispatcher = "dispatcher"

	// recordFormat is a record of an accepted connection: listener, client port,
	// and when, in ns.
	recordFormat = "accepted %d %d %d\n"

	// leaveTime is how long a worker that ends waits for its clients.
	leaveTime = 2 * time.Second
)

// job is what a worker is started for.
type job struct {
	By, Mode, Addr string
	Path           string // of the handoff; empty without
	Listeners      int
	Work           time.Duration // that an accept loop has with a connection
}

// report is what a worker says of itself, for the page too.
type report struct {
	Err       string         `json:"err,omitempty"` // it could not do what it was told
	Addr      string         `json:"addr"`
	Listeners []memberReport `json:"listeners"`
	Inherited uint64         `json:"inherited"`
	Members   int            `json:"members"`
	Sockets   int            `json:"sockets"`
	Balancer  string         `json:"balancer"`
	Steering  string         `json:"steering"`
	OnClose   string         `json:"onClose"`
	OnKill    string         `json:"onKill"`
	Reason    string         `json:"reason"`
}

type memberReport struct {
	State  string `json:"state"`  // open, stalled, closed
	Queued int    `json:"queued"` // -1: the system doesn't tell
}

// worker is the state of a worker process. Its main goroutine alone uses it.
type worker struct {
	job
	members   []*member
	opened    []net.Listener // all there ever were, for their counters
	loops     sync.WaitGroup
	answering sync.WaitGroup // connections that have no answer yet
}

type member struct {
	ln      net.Listener
	closed  chan struct{}
	stalled atomic.Int64 // until then, in Unix ns
}

// open opens one listener.
func (j job) open() (net.Listener, error) {
	if j.By == byReuseport {
		return listenReuseport(j.Addr)
	}
	opts := []lblisten.Option{lblisten.WithRequireKernel()}
	if j.Mode == modeDispatcher {
		opts[0] = lblisten.WithDispatcher()
	}
	if j.Path != "" {
		opts = append(opts, lblisten.WithHandoff(j.Path))
	}
	return lblisten.Listen("tcp", j.Addr, opts...)
}

// work is the main function of a worker process. It returns the exit status.
func work(text string) int {
	signal.Ignore(os.Interrupt) // of the terminal; the parent decides
	w := &worker{}
	err := json.Unmarshal([]byte(text), &w.job)
	for i := 0; i < w.Listeners && err == nil; i++ {
		w.members = append(w.members, nil)
		err = w.open(i)
	}
	w.report(err)
	if err != nil {
		return 1
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		w.report(w.obey(in.Text()))
	}
	w.stop()
	return 0
}

func (w *worker) obey(order string) error {
	var i int
	var d time.Duration
	order, args, _ := strings.Cut(order, " ")
	fmt.Sscan(args, &i, (*int64)(&d))
	if i < 0 || i >= len(w.members) {
		return fmt.Errorf("there is no listener %q", args)
	}
	switch m := w.members[i]; order {
	case "stall":
		m.stalled.Store(time.Now().Add(d).UnixNano())
	case "close":
		return m.close()
	case "open":
		if !m.isClosed() {
			return errors.New("it is open")
		}
		return w.open(i)
	case "report":
	default:
		return fmt.Errorf("there is no order %q", order)
	}
	return nil
}

// open opens listener i. The first one's address is that of all.
func (w *worker) open(i int) error {
	ln, err := w.job.open()
	if err != nil {
		return err
	}
	w.Addr = ln.Addr().String()
	m := &member{ln: ln, closed: make(chan struct{})}
	w.members[i] = m
	w.opened = append(w.opened, ln)
	w.loops.Add(1)
	go w.loop(i, m)
	return nil
}

func (m *member) isClosed() bool {
	select {
	case <-m.closed:
		return true
	default:
		return false
	}
}

func (m *member) close() error {
	if m.isClosed() {
		return nil
	}
	close(m.closed)
	return m.ln.Close()
}

// stop ends gracefully: no new connections, and an answer for the old ones.
func (w *worker) stop() {
	for _, m := range w.members {
		m.close()
	}
	w.loops.Wait()
	answered := make(chan struct{})
	go func() {
		w.answering.Wait()
		close(answered)
	}()
	select {
	case <-answered:
	case <-time.After(leaveTime):
	}
}

// loop accepts until the listener is closed.
func (w *worker) loop(i int, m *member) {
	defer w.loops.Done()
	for {
		c, err := m.ln.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // no descriptors, say: that passes
			fmt.Fprintln(os.Stderr, "dashboard worker:", err)
			m.wait(50 * time.Millisecond)
			continue
		}
		// In one write, and before the answer: see above.
		fmt.Fprintf(os.Stdout, recordFormat, i, c.RemoteAddr().(*net.TCPAddr).Port, time.Now().UnixNano())
		w.answering.Add(1)
		go w.answer(c)
		m.wait(w.Work)
		for left := m.stall(); left > 0; left = m.stall() {
			m.wait(left)
		}
	}
}

// stall is how long the member is still to be stalled.
func (m *member) stall() time.Duration {
	if m.isClosed() {
		return 0
	}
	return time.Until(time.Unix(0, m.stalled.Load()))
}

// wait waits, unless the member is closed.
func (m *member) wait(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-m.closed:
	}
}

// answer sends the client's byte back and waits until it goes.
func (w *worker) answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
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
	r := report{Addr: w.Addr}
	if err != nil {
		r.Err = err.Error()
	}
	for _, m := range w.members {
		if m == nil { // it could not be opened
			continue
		}
		mr := memberReport{State: "open", Queued: -1}
		l, ours := m.ln.(*lblisten.Listener)
		switch {
		case m.isClosed():
			mr.State = "closed"
		case m.stall() > 0:
			mr.State = "stalled"
		}
		switch {
		case mr.State == "closed":
		case ours:
			mr.Queued = l.Stats().Queued
			info := l.Info()
			r.Members, r.Sockets = info.Members, info.Sockets
			r.Balancer, r.Steering = info.Balancer.String(), info.Steering.String()
			r.OnClose, r.OnKill, r.Reason = info.OnClose.String(), info.OnKill.String(), ""
			if info.Reason != nil {
				r.Reason = info.Reason.Error()
			}
		default:
			mr.Queued = queued(m.ln)
			r.Members++
			r.Sockets++
		}
		r.Listeners = append(r.Listeners, mr)
	}
	for _, ln := range w.opened {
		if l, ok := ln.(*lblisten.Listener); ok {
			r.Inherited += l.Stats().Inherited
		}
	}
	json.NewEncoder(os.Stdout).Encode(r)
}
