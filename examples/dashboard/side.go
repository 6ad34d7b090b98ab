package main

// A side is all workers of one kind, lblisten's or go-reuseport's, the load on
// them, and the account of what became of each connection.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/lblisten/lblisten/examples/internal/child"
)

const (
	tick     = 500 * time.Millisecond // between two looks at everything
	history  = 120                    // ticks that the page shows
	rateOver = 4                      // ticks that a rate is the mean of
)

var stallTime = 5 * time.Second

// tally counts connections. Tried is the sum of the others.
type tally struct {
	Tried   int `json:"tried"`
	Waiting int `json:"waiting"` // for an answer, or to be found lost or dead
	Served  int `json:"served"`
	Lost    int `json:"lost"`
	Died    int `json:"died"` // with the process that had accepted it
	Refused int `json:"refused"`
	Other   int `json:"other"` // could not dial, or accepted by a living worker that didn't answer
}

type side struct {
	by      string
	most    int // clients at a time
	say     func(format string, args ...any)
	clients sync.WaitGroup

	mu      sync.Mutex // guards what follows
	job     job        // of every worker
	paused  bool       // no new clients
	kept    bool       // a keeper has the sockets too
	err     string     // why there are no workers
	slots   []*slot
	procs   []*recorded   // all that live, and those that just died
	dead    map[int]int64 // what all others had accepted: when, by the client's port
	pending []failure     // not looked into yet
	tally   tally
	inexact bool  // a worker died that could not be stopped and asked first
	before  tally // at the last tick
	history [history]sample
}

// recorded is a process and when it accepted, in Unix ns, by the client's port.
type recorded struct {
	*process
	accepted map[int]int64
}

// slot is the place of a worker, which may be gone.
type slot struct {
	p      *recorded
	state  string // running, stopped, killed or gone
	last   report
	totals []int // accepted by each listener
	before []snapshot
}

type snapshot struct {
	at     time.Time
	totals []int
}

// failure is a client without an answer, that nobody refused.
type failure struct {
	o     outcome // unanswered or failed
	port  int
	began int64 // Unix ns
	ended int64
	err   error
}

// sample is what came to pass in a tick.
type sample struct {
	Served  int `json:"served"` // per second
	Waiting int `json:"waiting"`
	Lost    int `json:"lost"`
}

func newSide(j job, workers, most int, say func(format string, args ...any)) *side {
	s := &side{by: j.By, job: j, most: most, dead: make(map[int]int64),
		say: func(format string, args ...any) { say(j.By+": "+format, args...) }}
	for range workers {
		s.slots = append(s.slots, &slot{state: "stopped", totals: make([]int, j.Listeners)})
	}
	return s
}

// startAll starts all workers, on a new port.
func (s *side) startAll(mode string) error {
	s.mu.Lock()
	s.job.Mode, s.job.Addr, s.err = mode, "127.0.0.1:0", ""
	s.mu.Unlock()
	for i := range s.slots {
		if err := s.start(i); err != nil {
			s.endAll()
			s.mu.Lock()
			s.err = err.Error()
			s.mu.Unlock()
			return err
		}
	}
	return nil
}

// endAll ends all workers. Its error is of those that could not end in peace.
func (s *side) endAll() error {
	s.mu.Lock()
	procs := slices.Clone(s.procs)
	for _, sl := range s.slots {
		if sl.state == "running" {
			sl.state = "stopped"
		}
	}
	s.mu.Unlock()
	errs := make([]error, len(procs))
	var all sync.WaitGroup
	for i, p := range procs {
		if p.gone() {
			continue // that was said when it happened
		}
		all.Add(1)
		go func() {
			defer all.Done()
			errs[i] = p.end()
		}()
	}
	all.Wait()
	return errors.Join(errs...)
}

// start starts worker i.
func (s *side) start(i int) error {
	s.mu.Lock()
	j, sl := s.job, s.slots[i]
	s.mu.Unlock()
	accepted := make(map[int]int64)
	p, r, err := start(j, func(listener, port int, at int64) {
		s.mu.Lock()
		defer s.mu.Unlock()
		accepted[port] = at
		sl.totals[listener]++
	})
	if p == nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	rec := &recorded{p, accepted}
	s.procs = append(s.procs, rec)
	if err == nil {
		sl.p, sl.last, sl.state = rec, r, "running"
		s.job.Addr = r.Addr
	}
	return err
}

// worker returns worker i if it runs, and whether another one does.
func (s *side) worker(i int) (p *recorded, others bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, sl := range s.slots {
		switch {
		case sl.state != "running":
		case k == i:
			p = sl.p
		default:
			others = true
		}
	}
	return p, others
}

func (s *side) setState(i int, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots[i].state = state
}

// restart replaces worker i. The old one goes first, so that the new one adopts
// its sockets, unless it is the only one and there is no keeper.
func (s *side) restart(i int) error {
	old, others := s.worker(i)
	if old != nil && (others || s.isKept()) {
		s.setState(i, "stopped")
		if err := old.end(); err != nil {
			return err
		}
		old = nil
	}
	if err := s.start(i); err != nil {
		return err
	}
	if old != nil {
		return old.end()
	}
	return nil
}

// kill kills worker i, and returns when it is gone. What it had accepted is noted
// before.
func (s *side) kill(i int) error {
	p, _ := s.worker(i)
	if p == nil {
		return errNotRunning
	}
	s.setState(i, "killed")
	s.mu.Lock()
	addr := s.job.Addr
	s.mu.Unlock()
	held, err := child.Freeze(p.cmd.Process.Pid, addr)
	now := time.Now().UnixNano()
	s.mu.Lock()
	for _, port := range held {
		p.accepted[port] = now
	}
	s.inexact = s.inexact || err != nil
	s.mu.Unlock()
	if err := p.cmd.Process.Kill(); err != nil {
		return err
	}
	<-p.ended
	return nil
}

var errNotRunning = errors.New("the worker isn't running")

// tell gives worker i an order.
func (s *side) tell(i int, order string) error {
	p, _ := s.worker(i)
	if p == nil {
		return errNotRunning
	}
	_, err := p.ask(order)
	return err
}

// setMode starts all workers anew. There is nobody who could inherit, so clients
// wait meanwhile.
func (s *side) setMode(ctx context.Context, mode string) error {
	s.setPaused(true)
	defer s.setPaused(false)
	deadline := time.Now().Add(patience + stallTime)
	for {
		s.mu.Lock()
		waiting := s.tally.Waiting
		s.mu.Unlock()
		switch {
		case waiting == 0:
			return errors.Join(s.endAll(), s.startAll(mode))
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("%d clients still wait", waiting)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (s *side) setKept(kept bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = kept
}

func (s *side) isKept() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept
}

func (s *side) setPaused(paused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = paused
}

// reset sets all counters to zero. Clients that wait have yet to be counted.
func (s *side) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tally = tally{Tried: s.tally.Waiting, Waiting: s.tally.Waiting}
	s.before, s.inexact = s.tally, false
	for _, sl := range s.slots {
		clear(sl.totals)
		sl.before = nil
	}
}

// load launches clients steadily until the context ends.
func (s *side) load(ctx context.Context, rate int) {
	last, owed := time.Now(), 0.0
	for t := time.NewTicker(10 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case now := <-t.C:
			// After a pause of the machine, not all at once.
			owed += float64(rate) * min(now.Sub(last), 100*time.Millisecond).Seconds()
			last = now
			s.launch(ctx, int(owed))
			owed -= float64(int(owed))
		}
	}
}

// launch lets n clients loose, or as many as there may be. It returns how many.
func (s *side) launch(ctx context.Context, n int) int {
	s.mu.Lock()
	n = max(0, min(n, s.most-s.tally.Waiting))
	if s.paused || s.err != "" {
		n = 0
	}
	s.tally.Tried += n
	s.tally.Waiting += n
	addr := s.job.Addr
	s.mu.Unlock()
	s.clients.Add(n)
	for range n {
		go func() {
			defer s.clients.Done()
			began := time.Now().UnixNano()
			o, port, err := exchange(ctx, addr)
			if ctx.Err() == nil {
				s.count(failure{o, port, began, time.Now().UnixNano(), err})
			}
		}()
	}
	return n
}

func (s *side) count(f failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch f.o {
	case served:
		s.tally.Served++
	case refused:
		s.tally.Refused++
	default:
		s.pending = append(s.pending, f)
		return
	}
	s.tally.Waiting--
}

// look asks all workers how they are, and finds out about the clients that had no
// answer until then.
func (s *side) look() {
	s.mu.Lock()
	pending, procs := s.pending, slices.Clone(s.procs)
	s.pending = nil
	s.mu.Unlock()

	// When a worker has reported, or has ended, everything is read that it recorded
	// before those clients failed.
	reports := make([]report, len(procs))
	var all sync.WaitGroup
	for i, p := range procs {
		all.Add(1)
		go func() {
			defer all.Done()
			reports[i], _ = p.ask("report")
		}()
	}
	all.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range procs {
		for _, sl := range s.slots {
			switch {
			case sl.p != p:
			case !p.gone():
				if reports[i].Listeners != nil {
					sl.last = reports[i]
				}
			case sl.state == "running": // nobody here has done it
				sl.state, s.inexact = "gone", true
				s.say("process %d is gone (%v)", p.cmd.Process.Pid, p.cmd.ProcessState)
			}
		}
	}
	var why, whyOther error
	for _, f := range pending {
		s.tally.Waiting--
		switch s.fateOf(f) {
		case died:
			s.tally.Died++
		case unanswered:
			s.tally.Lost++
			why = f.err
		default:
			s.tally.Other++
			whyOther = f.err
		}
	}
	// The dead are remembered as one.
	s.procs = slices.DeleteFunc(s.procs, func(p *recorded) bool {
		if !p.gone() {
			return false
		}
		for port, at := range p.accepted {
			s.dead[port] = max(s.dead[port], at)
		}
		return true
	})

	lost, diedNow := s.tally.Lost-s.before.Lost, s.tally.Died-s.before.Died
	if lost > 0 {
		s.say("%d lost (%v)", lost, innermost(why))
	}
	if diedNow > 0 {
		s.say("%d died with the process", diedNow)
	}
	if whyOther != nil {
		s.say("%d could not dial, or a living worker didn't answer (%v)", s.tally.Other-s.before.Other, whyOther)
	}
	copy(s.history[:], s.history[1:])
	s.history[history-1] = sample{
		Served:  int(float64(s.tally.Served-s.before.Served) / tick.Seconds()),
		Waiting: s.tally.Waiting, Lost: lost,
	}
	s.before = s.tally
	now := time.Now()
	for _, sl := range s.slots {
		sl.before = append(sl.before, snapshot{now, slices.Clone(sl.totals)})
		sl.before = sl.before[max(0, len(sl.before)-rateOver-1):]
	}
}

// fateOf finds out whether a process had accepted the client's connection. Others
// may have had the same port before it, and since.
func (s *side) fateOf(f failure) outcome {
	if f.o == failed || f.port == 0 {
		return f.o
	}
	isOf := func(accepted map[int]int64) bool {
		at := accepted[f.port]
		return f.began <= at && at <= f.ended
	}
	if isOf(s.dead) {
		return died
	}
	for _, p := range s.procs {
		switch {
		case !isOf(p.accepted):
		case p.gone():
			return died
		default:
			return failed
		}
	}
	return unanswered
}

// sideView is a side as the page sees it.
type sideView struct {
	By      string       `json:"by"`
	Addr    string       `json:"addr"`
	Err     string       `json:"err,omitempty"`
	Exact   bool         `json:"exact"` // else lost is an upper bound, and died a lower one
	Tally   tally        `json:"tally"`
	History []sample     `json:"history"`
	Workers []workerView `json:"workers"`
}

type workerView struct {
	report
	PID       int            `json:"pid"`
	State     string         `json:"state"`
	Listeners []listenerView `json:"listeners"`
}

type listenerView struct {
	memberReport
	Total int `json:"total"`
	Rate  int `json:"rate"` // per second
}

func (s *side) view() sideView {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := sideView{By: s.by, Addr: s.job.Addr, Err: s.err, Exact: !s.inexact, Tally: s.tally, History: slices.Clone(s.history[:])}
	for _, sl := range s.slots {
		w := workerView{State: sl.state}
		if sl.state == "running" {
			w.report, w.PID = sl.last, sl.p.cmd.Process.Pid
		}
		for i, total := range sl.totals {
			l := listenerView{Total: total, memberReport: memberReport{State: "closed", Queued: -1}}
			if i < len(w.report.Listeners) {
				l.memberReport = w.report.Listeners[i]
			}
			if n := len(sl.before); n > 1 && sl.state == "running" {
				first, last := sl.before[0], sl.before[n-1]
				l.Rate = int(float64(last.totals[i]-first.totals[i])/last.at.Sub(first.at).Seconds() + 0.5)
			}
			w.Listeners = append(w.Listeners, l)
		}
		v.Workers = append(v.Workers, w)
	}
	return v
}
