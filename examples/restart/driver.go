package main

// The driver: it starts servers and clients, and restarts the servers.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/child"
)

const (
	// startTime is how long a server may take to be ready, and then until the
	// others hold its sockets. Both are a matter of milliseconds.
	startTime = 10 * time.Second

	// endTime is how long a server may take to end.
	endTime = grace + 5*time.Second

	// pause is between two restarts.
	pause = 100 * time.Millisecond
)

// A way is how servers listen, and who holds their sockets when they go.
type way struct {
	name  string
	order string // "" for one server: it stops, then the next one starts
	heirs string // what a server must say of who takes over before it may go; "" for nothing
	fails bool   // and that is no fault
	begin func(f *fleet) (end func(), err error)
}

// ways are those of the flags.
func ways(s settings) []way {
	if s.processes == 2 {
		return []way{{name: "handoff, " + s.order, order: s.order, heirs: lblisten.InheritHandoff.String(), begin: useNothing}}
	}
	all := []way{
		{name: "lblisten, nobody holds the sockets", fails: true, begin: useNobody},
		{name: "lblisten with a keeper", heirs: lblisten.InheritHandoff.String(), begin: useKeeper},
		{name: "lblisten with systemd's stand-in", heirs: lblisten.InheritSystemd.String(), begin: useSystemd},
	}
	if s.compare {
		all = append([]way{{name: "net.Listen", fails: true, begin: useNet}}, all...)
		all = append(all, way{name: "tableflip", fails: true, begin: useTableflip})
	}
	return all
}

// drive runs the experiment, each way by itself. Its error is why it could not, or that
// requests failed.
func drive(ctx context.Context, s settings) error {
	var failed error
	rows := [][]string{{"", "restarts", "killed", "requests", "failed", "died", "repeated", "longest pause"}}
	for _, w := range ways(s) {
		l, killed, err := try(ctx, s, w)
		if errors.Is(err, errors.ErrUnsupported) {
			fmt.Printf("%s: not tried: %v\n", w.name, err)
			continue
		} else if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		rows = append(rows, []string{w.name, fmt.Sprint(s.restarts), fmt.Sprint(killed), fmt.Sprint(l.requests), fmt.Sprint(l.failures), fmt.Sprint(l.died), fmt.Sprint(l.repeated), fmt.Sprint(l.longest.Round(time.Millisecond))})
		if l.failures > 0 && !w.fails && failed == nil {
			failed = fmt.Errorf("%s: %d requests failed, the first one: %w", w.name, l.failures, l.first)
		}
	}
	fmt.Println()
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, row := range rows {
		fmt.Fprintf(out, "%s\t\n", strings.Join(row, "\t"))
	}
	out.Flush()
	fmt.Println("died: with a killed server, which had accepted the connection. repeated: by http.Client, because a connection that it had kept was closed. longest pause: without an answer to any client.")
	return failed
}

// try restarts servers under load, in one way.
func try(ctx context.Context, s settings, w way) (l *load, killed int, err error) {
	dir, err := os.MkdirTemp("", "lblisten-restart-")
	if err != nil {
		return nil, 0, err
	}
	defer os.RemoveAll(dir)
	f := &fleet{way: w, dir: dir, path: filepath.Join(dir, "handoff"), kills: s.kill > 0, startBy: (*exec.Cmd).Start}
	if f.addr, err = freeAddr(); err != nil {
		return nil, 0, err
	}
	if f.program, err = os.Executable(); err != nil {
		return nil, 0, err
	}
	end, err := w.begin(f)
	if err != nil {
		return nil, 0, err
	}
	defer end()
	defer f.kill()

	if err := f.start(ctx); err != nil {
		return nil, 0, err
	}
	if w.order == oldFirst {
		if err := f.start(ctx); err != nil {
			return nil, 0, err
		}
	}
	l = startLoad(f.addr, s.clients)
	f.load = l
	for i := 1; i <= s.restarts; i++ {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
		kill := s.kill > 0 && i%s.kill == 0
		if err := f.restart(ctx, kill); err != nil {
			return nil, 0, fmt.Errorf("restart %d: %w", i, err)
		}
		if kill {
			killed++
		}
		if i%10 == 0 || i == s.restarts {
			l.mu.Lock()
			fmt.Printf("%s: restart %d of %d, %d requests, %d failed\n", w.name, i, s.restarts, l.requests, l.failures)
			l.mu.Unlock()
		}
	}
	l.end() // before the last servers stop, which nobody takes over from
	for len(f.servers) > 0 {
		if err := f.stopOldest(); err != nil {
			return nil, 0, err
		}
	}
	return l, killed, nil
}

// signalTo sends a signal to a process.
func signalTo(pid int, sig os.Signal) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Signal(sig)
}

// freeAddr is an address that nobody listens on.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// A fleet is the servers that run, the oldest first.
type fleet struct {
	way
	dir     string
	path    string // of the handoff
	addr    string
	env     []string // of the servers
	servers []*server
	load    *load

	program string                    // of the servers
	kills   bool                      // some are killed
	flips   bool                      // SIGHUP has a server replace itself; all of them have one standard output
	startBy func(cmd *exec.Cmd) error // starts a process
}

func useNothing(f *fleet) (end func(), err error) { return func() {}, nil }

func useNobody(f *fleet) (end func(), err error) {
	f.env = []string{wayVariable + "=alone"}
	return func() {}, nil
}

func useNet(f *fleet) (end func(), err error) {
	f.env = []string{wayVariable + "=net"}
	return func() {}, nil
}

// useTableflip has the server of examples/more/tableflip, which has dependencies of its own,
// and replaces itself when it is told to.
func useTableflip(f *fleet) (end func(), err error) {
	program := filepath.Join(f.dir, "tableflip")
	if f.kills {
		return nil, fmt.Errorf("what a killed successor had accepted isn't known: %w", errors.ErrUnsupported)
	}
	build := exec.Command("go", "build", "-C", "examples/more", "-o", program, "./tableflip")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: go %v, from the root of the repository: %v: %s", errors.ErrUnsupported, build.Args[1:], err, out)
	}
	f.program, f.flips = program, true
	return func() {}, nil
}

func useKeeper(f *fleet) (end func(), err error) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := lblisten.Keep(ctx, f.path); err != nil {
			fmt.Fprintln(os.Stderr, "restart: the keeper:", err)
		}
	}()
	return func() {
		stop()
		<-ended
	}, nil
}

// restart replaces the oldest server.
func (f *fleet) restart(ctx context.Context, kill bool) error {
	if f.flips {
		return f.flip(ctx)
	}
	if f.order == newFirst {
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
	if f.order != newFirst {
		return f.start(ctx)
	}
	return nil
}

// flip has a server replace itself.
func (f *fleet) flip(ctx context.Context) error {
	s := f.servers[0]
	if err := signalTo(s.pid, hangup); err != nil {
		return err
	}
	return f.awaitReady(ctx, s)
}

// awaitReady returns when a server is ready.
func (f *fleet) awaitReady(ctx context.Context, s *server) error {
	rest, err := s.hear(ctx, readyLine, func(string) bool { return true })
	if err != nil {
		return fmt.Errorf("starting a server: %w", err)
	}
	s.pid = s.cmd.Process.Pid
	if _, pid, ok := strings.Cut(rest, ", pid "); ok {
		s.pid, err = strconv.Atoi(pid)
	}
	return err
}

// start starts a server and returns when it is ready and, if that is what it is about,
// whoever takes over from it is there.
func (f *fleet) start(ctx context.Context) error {
	s, err := f.startOne()
	if err != nil {
		return fmt.Errorf("starting a server: %w", err)
	}
	f.servers = append(f.servers, s)
	if err := f.awaitReady(ctx, s); err != nil {
		return err
	}
	if f.heirs == "" || f.order != "" && len(f.servers) == 1 {
		return nil
	}
	_, err = s.hear(ctx, heirsLine, func(heirs string) bool { return strings.Contains(heirs, f.heirs) })
	if err != nil {
		return fmt.Errorf("nobody else holds the sockets of a new server: %w", err)
	}
	return nil
}

// stopOldest stops the oldest server and returns when it is gone.
func (f *fleet) stopOldest() error {
	s := f.servers[0]
	if err := signalTo(s.pid, syscall.SIGTERM); err != nil {
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
	pid   int           // of the process, or of the one that has replaced it
	lines chan string   // its standard output
	ended chan struct{} // the process is gone
}

func (f *fleet) startOne() (*server, error) {
	s := &server{cmd: exec.Command(f.program), lines: make(chan string, 1000), ended: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), addrVariable+"="+f.addr, handoffVariable+"="+f.path, drivenVariable+"=1")
	s.cmd.Env = append(s.cmd.Env, f.env...)
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = child.DieWithParent
	if _, err := s.cmd.StdinPipe(); err != nil { // closed with the driver
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := f.startBy(s.cmd); err != nil {
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
