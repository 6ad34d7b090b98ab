package main

// Processes that the suite starts: its own program, with a role named in the
// environment. They talk in lines over stdin and stdout, and a child ends when
// its stdin does, so that none outlives the suite.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

const roleVariable = "LBLISTEN_BENCH_ROLE"

var roles map[string]func(*childSide) error

func init() { // not in the declaration, which would refer to itself
	roles = map[string]func(*childSide) error{
		"handoff":  serveHandoff,  // listeners_linux.go
		"idle":     serveIdle,     // idle_linux.go
		"keeper":   serveKeeper,   // listeners_linux.go
		"peer":     servePeer,     // listeners_linux.go
		"scale":    serveScale,    // scale_linux.go
		"web":      serveWeb,      // restart_linux.go
		"live":     serveLive,     // live_linux.go
		"stall":    serveStall,    // stall_linux.go
		"syscalls": serveSyscalls, // syscalls_linux.go
		"http":     serveHTTP,     // http_linux.go
	}
}

// childSide is what a child has of the connection to its parent.
type childSide struct {
	args  []string
	lines *bufio.Scanner
}

func isChild() bool { return os.Getenv(roleVariable) != "" }

func child() {
	p := &childSide{args: os.Args[1:], lines: bufio.NewScanner(os.Stdin)}
	role := os.Getenv(roleVariable)
	err := fmt.Errorf("no role %q", role)
	if serve := roles[role]; serve != nil {
		err = serve(p)
	}
	if err != nil {
		p.say("error " + err.Error())
		os.Exit(1)
	}
}

func (p *childSide) say(line string) { fmt.Println(line) }

// asked returns the parent's next line; false at its end.
func (p *childSide) asked() (string, bool) {
	ok := p.lines.Scan()
	return p.lines.Text(), ok
}

func (p *childSide) awaitEnd() {
	for p.lines.Scan() {
	}
}

// process is a child as its parent sees it.
type process struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *os.File // its stdout
	lines *bufio.Reader
	hello string // its first line: mostly its address
	ended bool
}

// start starts a child and waits for its first line.
func start(role string, args ...string) (*process, error) {
	return startUnder(nil, role, args...)
}

// startUnder starts it by another program, such as strace.
func startUnder(wrapper []string, role string, args ...string) (*process, error) {
	return startBy((*exec.Cmd).Start, wrapper, role, args...)
}

func startBy(begin func(*exec.Cmd) error, wrapper []string, role string, args ...string) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	argv := append(append(append([]string{}, wrapper...), exe), args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	p, err := launch(cmd, begin)
	if err != nil {
		return nil, fmt.Errorf("starting %s %s: %w", role, strings.Join(args, " "), err)
	}
	return p, nil
}

// launch starts a program that talks as a child does, and waits for its first line.
func launch(cmd *exec.Cmd, begin func(*exec.Cmd) error) (*process, error) {
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = w
	err = begin(cmd)
	w.Close()
	if err != nil {
		out.Close()
		return nil, err
	}
	p := &process{cmd: cmd, in: in, out: out, lines: bufio.NewReader(out)}
	if p.hello, err = p.read(); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *process) read() (string, error) {
	p.out.SetReadDeadline(time.Now().Add(30 * time.Second))
	line, err := p.lines.ReadString('\n')
	line = strings.TrimSuffix(line, "\n")
	if reason, ok := strings.CutPrefix(line, "error "); ok {
		return "", errors.New(reason)
	}
	return line, err
}

// ask sends a line and returns the answer.
func (p *process) ask(line string) (string, error) {
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		return "", err
	}
	return p.read()
}

// stop ends the child, gently first.
func (p *process) stop() {
	if p.ended {
		return
	}
	p.in.Close()
	timer := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
	p.cmd.Wait()
	timer.Stop()
	p.out.Close()
	p.ended = true
}

// kill ends it as kill -9 does.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.in.Close()
	p.out.Close()
	p.ended = true
}
