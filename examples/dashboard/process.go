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
	"time"

	"github.com/lblisten/lblisten/examples/internal/child"
)

// obedience is how long a worker may take to obey an order.
var obedience = 10 * time.Second

type process struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser
	reports chan report
	ended   chan struct{} // all it wrote is read, and the process is gone

	asking sync.Mutex // held by the one who waits for a report
}

// start starts a worker and waits until it listens. Each record is passed to
// accepted.
func start(j job, accepted func(listener, port int, at int64)) (*process, report, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, report{}, err
	}
	text, err := json.Marshal(j)
	if err != nil {
		return nil, report{}, err
	}
	p := &process{cmd: exec.Command(exe), reports: make(chan report, 4), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), jobVariable+"="+string(text))
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = child.DieWithParent
	if p.orders, err = p.cmd.StdinPipe(); err != nil {
		return nil, report{}, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, report{}, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, report{}, err
	}
	go p.listen(out, accepted)
	r, err := p.awaitReport()
	if err != nil {
		p.end()
	}
	return p, r, err
}

// listen reads the worker's records and reports until the worker is gone.
func (p *process) listen(out io.Reader, accepted func(listener, port int, at int64)) {
	defer close(p.ended)
	for in := bufio.NewScanner(out); in.Scan(); {
		var listener, port int
		var at int64
		var r report
		switch line := in.Text(); {
		case !strings.HasPrefix(line, "{"):
			if _, err := fmt.Sscanf(line+"\n", recordFormat, &listener, &port, &at); err == nil {
				accepted(listener, port, at)
			}
		case json.Unmarshal([]byte(line), &r) == nil:
			p.reports <- r
		}
	}
	p.cmd.Wait()
}

// ask gives an order and returns the report that answers it. All records that the
// worker wrote before are read then.
func (p *process) ask(order string) (report, error) {
	p.asking.Lock()
	defer p.asking.Unlock()
	if _, err := fmt.Fprintln(p.orders, order); err != nil {
		<-p.ended
		return report{}, fmt.Errorf("the worker is gone (%v)", p.cmd.ProcessState)
	}
	return p.awaitReport()
}

func (p *process) awaitReport() (report, error) {
	select {
	case r := <-p.reports:
		if r.Err != "" {
			return r, errors.New(r.Err)
		}
		return r, nil
	case <-p.ended:
		return report{}, fmt.Errorf("the worker is gone (%v)", p.cmd.ProcessState)
	case <-time.After(obedience):
		p.cmd.Process.Kill() // its reports could no longer be told apart
		return report{}, errors.New("the worker doesn't answer")
	}
}

// end ends the worker, gracefully if it can.
func (p *process) end() error {
	p.orders.Close()
	select {
	case <-p.ended:
	case <-time.After(leaveTime + obedience):
		p.cmd.Process.Kill()
		<-p.ended
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("worker %d has ended with %v", p.cmd.Process.Pid, p.cmd.ProcessState)
	}
	return nil
}

func (p *process) gone() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}
