package main

// The dashboard: both sides, what is done to them, and what the page is told.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/child"
)

const (
	mostLogs = 40

	// spareFiles are the descriptors that this process needs beside those of its
	// clients, generously.
	spareFiles = 256
)

type dashboard struct {
	settings
	dir       string // of the handoff
	canKernel bool
	backlog   int // of a listener; -1: the system doesn't tell
	notes     []string
	sides     []*side // lblisten's first
	orders    chan order
	path      string             // of the handoff; "" without one
	stopKeep  context.CancelFunc // nil while nobody keeps; obey's, as is kept
	kept      chan error
	running   sync.WaitGroup // the loads and the ticks

	mu      sync.Mutex // guards what follows
	mode    string
	busy    string // the order that is being obeyed
	log     []logLine
	lines   int           // that were ever logged
	state   []byte        // what the page is told, in JSON
	changed chan struct{} // closed when state has changed
}

type logLine struct {
	N    int    `json:"n"`
	At   string `json:"at"`
	Text string `json:"text"`
}

// order is what a button asks for. It is obeyed on both sides.
type order struct {
	Do       string `json:"do"`
	Worker   int    `json:"worker"`
	Listener int    `json:"listener"`
	Mode     string `json:"mode"`
	done     chan error
}

func newDashboard(ctx context.Context, s settings) (d *dashboard, err error) {
	d = &dashboard{settings: s, mode: modeKernel, notes: []string{}, log: []logLine{}, orders: make(chan order), changed: make(chan struct{})}
	if d.dir, err = os.MkdirTemp("", "lblisten-dashboard-"); err != nil {
		return nil, err
	}
	d.path, err = d.probe(filepath.Join(d.dir, "handoff"))
	if err != nil {
		os.RemoveAll(d.dir)
		return nil, err
	}
	most := d.burst + 1000
	if n := (child.FileLimit() - spareFiles) / 2; n < most {
		most = max(n, 1)
		d.notes = append(d.notes, fmt.Sprintf("At most %d connections at a time, because of the limit of open files.", most))
	}
	if !child.CanFreeze {
		d.notes = append(d.notes, "What a killed worker had accepted is known here by its records only: "+
			"after a kill, lost is an upper bound and died a lower one.")
	}
	// A quarter of what the accept loops can do, so that queues form and drain.
	work := 5 * time.Millisecond
	if d.rate > 0 {
		work = min(work, time.Second/4*time.Duration(d.workers*d.listeners)/time.Duration(d.rate))
	}
	for _, by := range []string{byLblisten, byReuseport} {
		j := job{By: by, Listeners: d.listeners, Work: work}
		if by == byLblisten {
			j.Path = d.path
		}
		d.sides = append(d.sides, newSide(j, d.workers, most, d.say))
	}
	if err := d.sides[0].startAll(d.mode); err != nil {
		d.end()
		return nil, fmt.Errorf("starting the workers: %w", err)
	}
	if err := d.sides[1].startAll(d.mode); err != nil {
		d.notes = append(d.notes, fmt.Sprintf("No %s here: %v.", byReuseport, err))
	}
	d.publish()
	for _, s := range d.sides {
		d.running.Add(1)
		go func() {
			defer d.running.Done()
			s.load(ctx, d.rate)
		}()
	}
	d.running.Add(1)
	go func() {
		defer d.running.Done()
		d.watch(ctx)
	}()
	return d, nil
}

// probe finds out what the system can. It returns the path of the handoff, or "".
func (d *dashboard) probe(path string) (string, error) {
	try := func(opt lblisten.Option) error {
		ln, err := lblisten.Listen("tcp", "127.0.0.1:0", opt)
		if err != nil {
			return err
		}
		d.backlog = ln.(*lblisten.Listener).Stats().Backlog
		return ln.Close()
	}
	err := try(lblisten.WithRequireKernel())
	switch {
	case err == nil:
		d.canKernel = true
	case errors.Is(err, lblisten.ErrUnsupported):
		d.mode = modeDispatcher
		d.notes = append(d.notes, "The kernel of this system doesn't balance.")
	default:
		return "", err
	}
	err = try(lblisten.WithHandoff(path))
	switch {
	case err == nil:
		return path, nil
	case errors.Is(err, lblisten.ErrUnsupported):
		d.workers = 1
		d.notes = append(d.notes, "One worker only: several need WithHandoff, which this system doesn't have. Killing it ends the service until it is started again.")
		return "", nil
	}
	return "", err
}

// end ends everything. The context must have ended before.
func (d *dashboard) end() error {
	d.running.Wait()
	errs := []error{d.keep(false)}
	for _, s := range d.sides {
		s.clients.Wait()
		errs = append(errs, s.endAll())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

func (d *dashboard) say(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines++
	d.log = append(d.log, logLine{d.lines, time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...)})
	d.log = d.log[max(0, len(d.log)-mostLogs):]
}

// watch looks at both sides, tick by tick.
func (d *dashboard) watch(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		var both sync.WaitGroup
		for _, s := range d.sides {
			both.Add(1)
			go func() {
				defer both.Done()
				s.look()
			}()
		}
		both.Wait()
		d.publish()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// state is what the page is told.
type state struct {
	System    string     `json:"system"`
	Rate      int        `json:"rate"`
	Work      float64    `json:"work"` // ms
	Burst     int        `json:"burst"`
	Stall     float64    `json:"stall"` // s
	Tick      float64    `json:"tick"`  // s
	Mode      string     `json:"mode"`
	CanKernel bool       `json:"canKernel"`
	CanKeep   bool       `json:"canKeep"`
	Keeper    bool       `json:"keeper"`
	Busy      string     `json:"busy"`
	Notes     []string   `json:"notes"`
	Sides     []sideView `json:"sides"`
	Log       []logLine  `json:"log"`
}

func (d *dashboard) publish() {
	st := state{System: runtime.GOOS + "/" + runtime.GOARCH, Rate: d.rate, Stall: stallTime.Seconds(),
		Work: float64(d.sides[0].job.Work) / 1e6, Tick: tick.Seconds(), CanKernel: d.canKernel, CanKeep: d.path != "", Keeper: d.sides[0].isKept(), Notes: d.notes}
	for _, s := range d.sides {
		st.Sides = append(st.Sides, s.view())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	st.Mode, st.Busy, st.Log, st.Burst = d.mode, d.busy, slices.Clone(d.log), d.burstSize(d.mode)
	text, err := json.Marshal(st)
	if err != nil {
		panic(err) // it holds nothing that has no JSON
	}
	d.state = text
	close(d.changed)
	d.changed = make(chan struct{})
}

// burstSize is as many as wait in the queues with room to spare: FreeBSD resets what
// comes to a full one, which would be nobody's loss.
func (d *dashboard) burstSize(mode string) int {
	queues := d.workers * d.listeners
	if mode == modeDispatcher {
		queues = 1
	}
	if d.backlog < 0 {
		return d.burst
	}
	return min(d.burst, max(queues*d.backlog/2, 1))
}

// latest returns the state, and a channel that is closed when there is another.
func (d *dashboard) latest() (text []byte, changed <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state, d.changed
}

// obey obeys the orders, one after the other, until the context ends. It starts
// processes, so it must not leave its thread.
func (d *dashboard) obey(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case o := <-d.orders:
			d.setBusy(o.Do)
			err := d.do(ctx, o)
			d.setBusy("")
			if err != nil {
				d.say("%s failed: %v", o.Do, err)
			}
			d.publish()
			o.done <- err
		}
	}
}

func (d *dashboard) setBusy(what string) {
	d.mu.Lock()
	d.busy = what
	d.mu.Unlock()
	d.publish()
}

// do does on both sides what an order asks for.
func (d *dashboard) do(ctx context.Context, o order) error {
	each := func(f func(s *side) error) error {
		var errs []error
		for _, s := range d.sides {
			if s.view().Err != "" {
				continue // it never was
			}
			if err := f(s); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", s.by, err))
			}
		}
		return errors.Join(errs...)
	}
	if o.Worker < 0 || o.Worker >= d.workers || o.Listener < 0 || o.Listener >= d.listeners {
		return fmt.Errorf("there is no listener %d of worker %d", o.Listener+1, o.Worker+1)
	}
	w, l := o.Worker+1, o.Listener+1
	switch o.Do {
	case "stall":
		d.say("listener %d.%d stalls for %v", w, l, stallTime)
		return each(func(s *side) error { return s.tell(o.Worker, fmt.Sprintf("stall %d %d", o.Listener, stallTime)) })
	case "close", "open":
		d.say("%s listener %d.%d", o.Do, w, l)
		return each(func(s *side) error { return s.tell(o.Worker, fmt.Sprintf("%s %d", o.Do, o.Listener)) })
	case "kill":
		last := ""
		if _, others := d.sides[0].worker(o.Worker); !others {
			last = ", the last one: nobody inherits"
			if d.stopKeep != nil {
				last = ", the last one: the keeper has " + byLblisten + "'s sockets until it is started again"
			}
		}
		d.say("SIGKILL to worker %d%s", w, last)
		return each(func(s *side) error { return s.kill(o.Worker) })
	case "restart":
		d.say("restart worker %d", w)
		return each(func(s *side) error { return s.restart(o.Worker) })
	case "burst":
		d.mu.Lock()
		burst := d.burstSize(d.mode)
		d.mu.Unlock()
		d.say("burst of %d connections", burst)
		return each(func(s *side) error {
			if n := s.launch(ctx, burst); n < burst {
				return fmt.Errorf("only %d connections, because as many wait as may", n)
			}
			return nil
		})
	case "keeper":
		if d.path == "" {
			return errors.New("there are no keepers here")
		}
		d.say("%s: %s", byLblisten, map[bool]string{true: "the keeper goes", false: "a keeper comes: it holds all sockets, and accepts nothing"}[d.stopKeep != nil])
		return d.keep(d.stopKeep == nil)
	case "reset":
		d.say("counters reset")
		return each(func(s *side) error { s.reset(); return nil })
	case "mode":
		if o.Mode != modeDispatcher && (o.Mode != modeKernel || !d.canKernel) {
			return fmt.Errorf("there is no mode %q here", o.Mode)
		}
		d.say("%s workers start anew, balanced by the %s", byLblisten, o.Mode)
		keeps := d.stopKeep != nil // not the sockets of the old port
		if err := errors.Join(d.keep(false), d.sides[0].setMode(ctx, o.Mode), d.keep(keeps)); err != nil {
			return err
		}
		d.mu.Lock()
		d.mode = o.Mode
		d.mu.Unlock()
		return nil
	}
	return fmt.Errorf("there is no order %q", o.Do)
}

// keep has this process keep the workers' sockets, or end that.
func (d *dashboard) keep(on bool) error {
	switch {
	case on == (d.stopKeep != nil):
		return nil
	case on:
		ctx, stop := context.WithCancel(context.Background())
		kept := make(chan error, 1)
		d.stopKeep, d.kept = stop, kept
		go func() { kept <- lblisten.Keep(ctx, d.path) }()
		d.sides[0].setKept(true)
		return nil
	}
	d.sides[0].setKept(false)
	d.stopKeep()
	d.stopKeep = nil
	return <-d.kept
}
