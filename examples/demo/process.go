package main

// A worker process as its parent sees it: started, told what to do, listened
// to, and ended in every case.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lblisten/lblisten/examples/internal/child"
)

// obedience is how long a worker may take to obey an order.
const obedience = 10 * time.Second

type process struct {
	by      string
	cmd     *exec.Cmd
	orders  io.WriteCloser
	reports chan report
	ended   chan struct{} // all it wrote is read, and the process is gone
	last    report

	mu       sync.Mutex
	accepted []acceptedConn // guarded by mu
}

// acceptedConn is a connection that an Accept of the worker has returned.
type acceptedConn struct{ listener, clientPort int }

// unknownListener has accepted a connection that was not recorded.
const unknownListener = -1

// startWorker starts a worker whose listeners are made by lblisten or
// go-reuseport, and waits until it listens. The path is that of the handoff, or
// empty.
func startWorker(by, addr, path string) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{by: by, cmd: exec.Command(exe, os.Args[1:]...),
		reports: make(chan report, 4), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), jobVariable+"="+by+" "+addr+" "+path)
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = child.DieWithParent
	if p.orders, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a worker: %w", err)
	}
	go p.listen(out)
	if err := p.awaitReport(); err != nil {
		p.end()
		return nil, fmt.Errorf("starting a worker with %s on %s: %w", by, addr, err)
	}
	return p, nil
}

// listen reads the worker's records and reports until the worker is gone.
func (p *process) listen(out io.Reader) {
	defer close(p.ended)
	for in := bufio.NewScanner(out); in.Scan(); {
		var a acceptedConn
		var r report
		switch line := in.Text(); {
		case !strings.HasPrefix(line, "{"):
			if _, err := fmt.Sscanf(line+"\n", recordFormat, &a.listener, &a.clientPort); err == nil {
				p.mu.Lock()
				p.accepted = append(p.accepted, a)
				p.mu.Unlock()
			}
		case json.Unmarshal([]byte(line), &r) == nil:
			p.reports <- r
		}
	}
	p.cmd.Wait()
}

// ask gives an order and returns the report that answers it.
func (p *process) ask(order string) (report, error) {
	if _, err := fmt.Fprintln(p.orders, order); err != nil {
		return p.last, fmt.Errorf("a worker is gone: %w", err)
	}
	if err := p.awaitReport(); err != nil {
		return p.last, fmt.Errorf("a worker was told to %s: %w", order, err)
	}
	return p.last, nil
}

func (p *process) awaitReport() error {
	var r report
	select {
	case r = <-p.reports:
	case <-p.ended:
		select {
		case r = <-p.reports: // its last words
		default:
			return fmt.Errorf("it ended (%v)", p.cmd.ProcessState)
		}
	case <-time.After(obedience):
		return errors.New("no answer")
	}
	p.last = r
	if r.Err != "" {
		return errors.New(r.Err)
	}
	return nil
}

// stop stops the worker gracefully and returns when it is gone.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := p.awaitReport(); err != nil {
		return fmt.Errorf("a worker was stopped: %w", err)
	}
	return p.awaitEnd()
}

// kill kills the worker and returns when it is gone.
func (p *process) kill() error {
	var held []int
	if child.CanFreeze { // else what it has accepted and not recorded counts as lost
		var err error
		if held, err = child.Freeze(p.cmd.Process.Pid, p.last.Addr); err != nil {
			return err
		}
	}
	if err := p.cmd.Process.Kill(); err != nil {
		return err
	}
	if err := p.awaitEnd(); err != nil {
		return err
	}
	// Killed between Accept and the record. Until now no client of this round
	// was reset, so each has a port of its own.
	p.mu.Lock()
	defer p.mu.Unlock()
	recorded := make(map[int]bool)
	for _, a := range p.accepted {
		recorded[a.clientPort] = true
	}
	for _, port := range held {
		if !recorded[port] {
			recorded[port] = true // the kernel's list may have it twice
			p.accepted = append(p.accepted, acceptedConn{unknownListener, port})
		}
	}
	return nil
}

func (p *process) awaitEnd() error {
	select {
	case <-p.ended:
		return nil
	case <-time.After(obedience):
		return errors.New("a worker does not end")
	}
}

// end ends the worker, whatever it is doing.
func (p *process) end() {
	p.orders.Close()
	select {
	case <-p.ended:
	case <-time.After(time.Second):
		p.cmd.Process.Kill()
		<-p.ended
	}
}

// forget drops the records of the round before.
func (p *process) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.accepted = nil
}

func (p *process) acceptedConns() []acceptedConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}
