package main

// The driver: it starts servers and clients, and restarts the servers.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/child"
)

const (
	// startTime is how long a server may take to be ready, and then until the
	// others hold its sockets. Both are a matter of milliseconds.
	startTime = 10 * time.Second

	// endTime is how long a server may take to end.
	endTime = leaveTime + answerTime + shutdownTime + 5*time.Second

	// pause is between two restarts.
	pause = 100 * time.Millisecond
)

// drive runs the experiment. Its error is why it could not, or that requests
// failed.
func drive(ctx context.Context, s settings) error {
	dir, err := os.MkdirTemp("", "lblisten-restart-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	f := &fleet{path: filepath.Join(dir, "handoff"), kept: s.order == stopStart}
	defer f.kill()
	if f.kept {
		keeping, stop := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if err := lblisten.Keep(keeping, f.path); err != nil {
				fmt.Fprintln(os.Stderr, "restart: the keeper:", err)
			}
		}()
		defer func() {
			stop()
			<-ended
		}()
	}

	if err := f.start(ctx); err != nil {
		return err
	}
	if s.order == oldFirst {
		if err := f.start(ctx); err != nil {
			return err
		}
	}
	f.load = startLoad(f.addr, s.clients)
	begin, killed := time.Now(), 0
	for i := 1; i <= s.restarts; i++ {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		kill := s.kill > 0 && i%s.kill == 0
		if err := f.restart(ctx, s.order, kill); err != nil {
			return fmt.Errorf("restart %d: %w", i, err)
		}
		how := "stopped"
		if kill {
			killed++
			how = "killed"
		}
		if i%10 == 0 || i == s.restarts {
			l := f.load
			l.mu.Lock()
			fmt.Printf("restart %d of %d (%s): %d requests, %d failed\n", i, s.restarts, how, l.requests, l.failures)
			l.mu.Unlock()
		}
	}
	took := time.Since(begin)
	f.load.end() // before the last servers stop, which nobody takes over from
	for len(f.servers) > 0 {
		if err := f.stopOldest(); err != nil {
			return err
		}
	}

	l := f.load
	fmt.Printf("\n%d restarts (%s, %d of them by SIGKILL) in %.1f s, %d clients\n", s.restarts, s.order, killed, took.Seconds(), s.clients)
	fmt.Printf("%d requests, answered by %d servers; %d failed\n", l.requests, len(l.pids), l.failures)
	if s.kill > 0 {
		fmt.Printf("%d died with the process: it was killed when it had accepted the connection\n", l.died)
	}
	fmt.Printf("%d were repeated by http.Client, because a connection that it had kept was closed\n", l.repeated)
	if l.failures > 0 {
		return fmt.Errorf("%d requests failed, the first one: %w", l.failures, l.first)
	}
	return nil
}

// A fleet is the servers that run, the oldest first.
type fleet struct {
	path    string // of the handoff
	kept    bool   // there is a keeper
	addr    string
	servers []*server
	load    *load
}

// restart replaces the oldest server.
func (f *fleet) restart(ctx context.Context, order string, kill bool) error {
	if order == newFirst {
		if err := f.start(ctx); err != nil {
			return err
		}
	}
	if kill {
		if err := f.killOldest(); err != nil {
			return err
		}
	} else if err := f.stopOldest(); err != nil {
		return err
	}
	if order != newFirst {
		return f.start(ctx)
	}
	return nil
}

// start starts a server and returns when it is ready and, if there are others or a
// keeper, holds their sockets, and they its.
func (f *fleet) start(ctx context.Context) error {
	addr := f.addr
	if addr == "" {
		addr = "127.0.0.1:0" // the first server chooses the port
	}
	s, err := startServer(addr, f.path)
	if err != nil {
		return fmt.Errorf("starting a server: %w", err)
	}
	f.servers = append(f.servers, s)
	if f.addr, err = s.hear(ctx, readyLine, func(string) bool { return true }); err != nil {
		return fmt.Errorf("starting a server: %w", err)
	}
	if len(f.servers) == 1 && !f.kept {
		return nil
	}
	_, err = s.hear(ctx, heirsLine, func(heirs string) bool {
		return strings.Contains(heirs, lblisten.InheritHandoff.String())
	})
	if err != nil {
		return fmt.Errorf("nobody else holds the sockets of a new server: %w", err)
	}
	return nil
}

// stopOldest stops the oldest server and returns when it is gone.
func (f *fleet) stopOldest() error {
	s := f.servers[0]
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping a server: %w", err)
	}
	if err := s.awaitEnd(); err != nil {
		return fmt.Errorf("stopping a server: %w", err)
	}
	f.servers = f.servers[1:]
	if !s.cmd.ProcessState.Success() {
		return fmt.Errorf("a server was stopped and ended with %v", s.cmd.ProcessState)
	}
	return nil
}

// killOldest kills the oldest server and returns when it is gone. To be exact
// about what dies with it, it is frozen first, and the kernel is asked what it
// has accepted.
func (f *fleet) killOldest() error {
	s := f.servers[0]
	ports, err := child.Freeze(s.cmd.Process.Pid, f.addr)
	if err != nil {
		return fmt.Errorf("freezing a server: %w", err)
	}
	f.load.doom(ports)
	if err := s.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("killing a server: %w", err)
	}
	f.servers = f.servers[1:]
	return s.awaitEnd()
}

// kill ends whatever runs still.
func (f *fleet) kill() {
	for _, s := range f.servers {
		s.cmd.Process.Kill()
		<-s.ended
	}
}

// A server is a server process as the driver sees it.
type server struct {
	cmd   *exec.Cmd
	lines chan string   // its standard output
	ended chan struct{} // the process is gone
}

func startServer(addr, path string) (*server, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &server{cmd: exec.Command(exe), lines: make(chan string, 1000), ended: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), addrVariable+"="+addr, handoffVariable+"="+path, drivenVariable+"=1")
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = child.DieWithParent
	if _, err := s.cmd.StdinPipe(); err != nil { // closed with the driver
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go s.read(out)
	return s, nil
}

// read passes on what the server says until it ends.
func (s *server) read(out io.Reader) {
	for in := bufio.NewScanner(out); in.Scan(); {
		select {
		case s.lines <- in.Text():
		default: // nobody listens any more
		}
	}
	s.cmd.Wait()
	close(s.ended)
}

// hear waits until the server says a line that begins with prefix and goes on as
// wanted, and returns how it goes on.
func (s *server) hear(ctx context.Context, prefix string, wanted func(rest string) bool) (rest string, err error) {
	timeout := time.NewTimer(startTime)
	defer timeout.Stop()
	for {
		select {
		case line := <-s.lines:
			if rest, ok := strings.CutPrefix(line, prefix); ok && wanted(rest) {
				return rest, nil
			}
		case <-s.ended:
			return "", fmt.Errorf("it ended (%v)", s.cmd.ProcessState)
		case <-timeout.C:
			return "", fmt.Errorf("it has not said %q within %v", prefix, startTime)
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

func (s *server) awaitEnd() error {
	select {
	case <-s.ended:
		return nil
	case <-time.After(endTime):
		return errors.New("it does not end")
	}
}
