package main

// The experiment: what happens in a round, and what is counted. It knows
// workers and clients only by what they report.

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"time"

	"github.com/lblisten/lblisten"
)

const (
	listenersPerWorker = 4

	// inFlight is the most clients that dial or wait at the same time while the
	// workers accept.
	inFlight = 256

	// unknownBacklog is taken for the length of a queue where the system doesn't
	// tell it: the default of macOS and the BSDs.
	unknownBacklog = 128

	// spareFiles are the descriptors that a process needs beside those of the
	// connections, generously.
	spareFiles = 128

	// coverTime is how long a round waits until the workers hold each other's
	// sockets. It takes some milliseconds.
	coverTime = 5 * time.Second
)

// event is what goes away in a round.
type event string

const (
	listenerCloses event = "a listener closes"
	workerStops    event = "SIGTERM to a worker"
	workerDies     event = "SIGKILL to a worker"
)

// A scene is one of the cases that the rounds take in turn.
type scene struct {
	event    event
	standing bool // nobody accepts until the event is over
}

var scenes = []scene{
	{listenerCloses, false}, {listenerCloses, true},
	{workerStops, false}, {workerStops, true},
	{workerDies, false}, {workerDies, true},
}

func (s scene) String() string {
	if s.standing {
		return string(s.event) + ", all standing still"
	}
	return string(s.event) + ", all accepting"
}

// claimed tells whether the package, by what the worker that it will happen to
// says is in force, claims that nothing is lost.
func (s scene) claimed(r report) bool {
	switch s.event {
	case listenerCloses:
		return r.OnClose != 0
	case workerStops: // closes all its listeners: no sibling is left
		return r.OnClose&^lblisten.InheritProcess != 0
	}
	return r.OnKill != 0
}

// tally counts the clients of all rounds of a case. Connections are served +
// lost + died + refused, or some are unaccounted for.
type tally struct {
	Case        string `json:"case"`
	Rounds      int    `json:"rounds"`
	Connections int    `json:"connections"`
	Served      int    `json:"served"`
	Lost        int    `json:"lost"`
	Died        int    `json:"died_with_the_process"`
	Refused     int    `json:"refused"`
	Inherited   int    `json:"inherited"`
	Unaccounted int    `json:"unaccounted"`
	Claimed     bool   `json:"claims_0_lost"` // in every round
	Broken      int    `json:"broken_claims"` // lost where 0 lost was claimed
}

// add counts one more round, or the sum of a case.
func (t *tally) add(u tally) {
	t.Claimed = u.Claimed && (t.Claimed || t.Rounds == 0)
	t.Rounds += u.Rounds
	t.Connections += u.Connections
	t.Served += u.Served
	t.Lost += u.Lost
	t.Died += u.Died
	t.Refused += u.Refused
	t.Inherited += u.Inherited
	t.Unaccounted += u.Unaccounted
	t.Broken += u.Broken
}

// result is what all rounds with one kind of listener came to.
type result struct {
	By        string   `json:"listeners_by"`
	Workers   int      `json:"workers"`
	Listeners int      `json:"listeners_per_worker"`
	Balancer  string   `json:"balancer"`
	OnClose   string   `json:"on_close"`
	OnKill    string   `json:"on_kill"`
	Reason    string   `json:"reason,omitempty"`
	Cases     []*tally `json:"cases"`
	Total     tally    `json:"total"`
	Accepted  [][]int  `json:"accepted"` // by worker and listener
	Seconds   float64  `json:"seconds"`
}

// experiment is the settings, and what the first run has found out for all.
type experiment struct {
	settings
	progress io.Writer
	path     string // of the handoff; empty without
	workers  int    // processes; 0 before the first run
	queue    int    // connections that may wait in the kernel at once
}

// run goes through all rounds with listeners made by lblisten or go-reuseport.
func (e *experiment) run(ctx context.Context, by string) (*result, error) {
	begin := time.Now()
	first, err := startWorker(by, "127.0.0.1:0", e.path)
	if err != nil {
		return nil, err
	}
	workers := []*process{first}
	defer func() {
		for _, w := range workers {
			w.end()
		}
	}()
	e.settle(first.last)
	for len(workers) < e.workers {
		w, err := startWorker(by, first.last.Addr, e.path)
		if err != nil {
			return nil, err
		}
		workers = append(workers, w)
	}

	play := scenes
	if e.workers == 1 {
		play = scenes[:2] // with nobody else on the port the others show nothing
	}
	res := &result{By: by, Workers: e.workers, Listeners: listenersPerWorker}
	for range workers {
		res.Accepted = append(res.Accepted, make([]int, listenersPerWorker))
	}
	for i := range min(e.rounds, len(play)) {
		res.Cases = append(res.Cases, &tally{Case: play[i].String()})
	}
	for i := range e.rounds {
		roundBegin := time.Now()
		// Every pass over the cases begins with the other worker.
		victim := (i + i/len(play)) % len(workers)
		s := play[i%len(play)]
		t, why, err := e.round(ctx, s, workers, victim, i%listenersPerWorker, res)
		if err != nil {
			return nil, fmt.Errorf("round %d (%v, %s): %w", i+1, s, by, err)
		}
		res.Cases[i%len(play)].add(t)
		fmt.Fprintf(e.progress, "%-12s %d/%d  %s: %d lost%s of %d (%.1f s)\n",
			by, i+1, e.rounds, t.short(), t.Lost, why, t.Connections, time.Since(roundBegin).Seconds())
	}
	for _, c := range res.Cases {
		res.Total.add(*c)
	}
	res.Total.Case = "all"
	res.Seconds = time.Since(begin).Seconds()
	return res, nil
}

// settle decides, once for all runs, what depends on the system.
func (e *experiment) settle(r report) {
	if e.workers != 0 {
		return
	}
	e.workers = 2
	queues := e.workers * r.Sockets
	if r.Balancer != lblisten.BalancerKernel {
		queues = 1 // all workers accept from one socket, if it can be shared
	}
	if r.Balancer != lblisten.BalancerKernel && e.path == "" {
		e.workers = 1
		fmt.Fprintf(e.progress, "note: one worker process only, because two cannot share the port; "+
			"what is left to show is a listener that closes (%s)\n", r.Reason)
	}
	if r.Backlog < 0 {
		r.Backlog = unknownBacklog
	}
	// Half of what the queues can take: the kernel's hash doesn't fill them evenly.
	e.queue = max(1, queues*r.Backlog/2)
	if e.conns > e.queue {
		fmt.Fprintf(e.progress, "note: %d connections instead of %d in the rounds in which all stand still, "+
			"because a queue takes %d\n", e.queue, e.conns, r.Backlog)
	}
}

// round lets one burst and one event happen, and brings the workers back to
// what they were. It returns with the first reason of a client without answer.
func (e *experiment) round(ctx context.Context, s scene, workers []*process, victim, listener int, res *result) (t tally, why string, err error) {
	n := e.conns
	order := "accept"
	if s.standing {
		n, order = min(n, e.queue), "hold"
	}
	if err := e.awaitCover(ctx, workers); err != nil {
		return t, "", err
	}
	inherited := 0 // before the round
	for _, w := range workers {
		w.forget()
		r, err := w.ask(order)
		if err != nil {
			return t, "", err
		}
		inherited += r.Inherited
	}
	v := workers[victim]
	res.describe(v.last)
	claimed := s.claimed(v.last)

	b := startBurst(v.last.Addr, n, min(inFlight, e.queue), s.standing)
	if err := b.awaitReady(ctx); err != nil {
		return t, "", err
	}
	gone, err := happen(s.event, v, listener)
	if err != nil {
		return t, "", err
	}
	for _, w := range workers {
		if s.standing && w != gone {
			if _, err := w.ask("accept"); err != nil {
				return t, "", err
			}
		}
	}
	b.readAnswers()
	if err := b.wait(ctx); err != nil {
		return t, "", err
	}
	defer b.close()

	t = tally{Case: s.String(), Rounds: 1, Connections: n, Served: len(b.served), Refused: b.refused, Claimed: claimed}
	for i, w := range workers {
		// The report comes after the records of all that was accepted before, and
		// so does the end of a worker that is gone.
		if w != gone {
			if _, err := w.ask("report"); err != nil {
				return t, "", err
			}
		}
		t.Inherited += w.last.Inherited
		for _, a := range w.acceptedConns() {
			if a.listener != unknownListener {
				res.Accepted[i][a.listener]++
			}
		}
	}
	t.Inherited -= inherited
	t.Died, t.Unaccounted = compareRecords(b, workers, gone)
	t.Lost = b.unanswered - t.Died - t.Unaccounted
	if t.Lost < 0 { // more have died than were unanswered: that must not be either
		t.Unaccounted, t.Lost = t.Unaccounted-t.Lost, 0
	}
	if claimed {
		t.Broken = t.Lost
	}
	if t.Lost > 0 {
		why = fmt.Sprintf(" (%v)", b.why)
	}

	if gone == nil {
		_, err = v.ask(fmt.Sprintf("open %d", listener))
		return t, why, err
	}
	again, err := startWorker(v.by, v.last.Addr, e.path)
	if err == nil {
		workers[victim] = again
	}
	return t, why, err
}

// awaitCover waits until every worker says that another one holds its sockets: a
// worker that was just started needs a moment. What is not so after some seconds
// is not claimed, and the worker's reason is printed.
func (e *experiment) awaitCover(ctx context.Context, workers []*process) error {
	if e.path == "" || len(workers) < 2 || workers[0].by != byLblisten {
		return nil
	}
	deadline := time.Now().Add(coverTime)
	for _, w := range workers {
		for {
			r, err := w.ask("report")
			if err != nil {
				return err
			}
			if r.OnKill&lblisten.InheritHandoff != 0 {
				break
			}
			if time.Now().After(deadline) {
				fmt.Fprintf(e.progress, "note: no other worker holds the sockets of process %d (%s)\n", w.cmd.Process.Pid, r.Reason)
				break
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// happen makes the event happen to a worker, and returns it if it is gone now.
func happen(what event, w *process, listener int) (gone *process, err error) {
	switch what {
	case listenerCloses:
		_, err = w.ask(fmt.Sprintf("close %d", listener))
		return nil, err
	case workerStops:
		return w, w.stop()
	}
	return w, w.kill()
}

// compareRecords holds what the workers accepted against what the clients got.
// A connection that the worker that is gone had accepted, and no client had an
// answer on, has died. Any other difference must not be.
func compareRecords(b *burst, workers []*process, gone *process) (died, unaccounted int) {
	open := make(map[int]int) // accepted and not answered, by the client's port
	for _, w := range workers {
		for _, a := range w.acceptedConns() {
			open[a.clientPort]++
		}
	}
	for _, port := range b.served {
		open[port]--
	}
	if gone != nil {
		for _, a := range gone.acceptedConns() {
			if open[a.clientPort] > 0 {
				open[a.clientPort]--
				died++
			}
		}
	}
	for _, n := range open {
		unaccounted += max(n, -n)
	}
	return died, unaccounted
}

// describe notes what is in force.
func (res *result) describe(r report) {
	res.Balancer, res.OnClose, res.OnKill, res.Reason = r.Balancer.String(), r.OnClose.String(), r.OnKill.String(), r.Reason
	if res.By == byReuseport {
		res.Balancer = "whoever the system lets (" + runtime.GOOS + ")"
	}
}

// verdict is what the demo says in the end.
type verdict struct {
	Runs        []*result `json:"runs"` // lblisten's first
	Broken      int       `json:"broken_claims"`
	Unaccounted int       `json:"unaccounted"`
	Kept        bool      `json:"kept"`
}

func judge(results []*result) verdict {
	v := verdict{Runs: slices.Clone(results)}
	for _, r := range results {
		v.Broken += r.Total.Broken
		v.Unaccounted += r.Total.Unaccounted
	}
	v.Kept = v.Broken == 0 && v.Unaccounted == 0
	return v
}
