package main

// How many system calls an Accept takes, counted by strace.

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sort"
	"strconv"
	"strings"
	"syscall"
)

const (
	straceAccepts = 100
	marker        = -4242 // no descriptor: a write to it marks a place in strace's output
)

// serveSyscalls accepts so many connections that wait, between two marks. Its
// argument is a contender.
func serveSyscalls(p *childSide) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	o, err := contenders[p.args[0]].open(1)
	if err != nil {
		return err
	}
	defer o.close()
	p.say(o.addr.String())
	p.asked()
	t := &taken{conns: make([]net.Conn, 0, straceAccepts), fds: make([]int, 0, straceAccepts)}
	syscall.Write(marker, nil)
	err = o.take(t, 0, straceAccepts)
	syscall.Write(marker, nil)
	if err != nil {
		return err
	}
	p.say("done")
	p.awaitEnd()
	return nil
}

// traced counts the system calls of one contender's Accepts, by name.
func traced(strace, name string) (map[string]int, error) {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "trace")
	p, err := startUnder([]string{strace, "-f", "-qq", "-o", out}, "syscalls", name)
	if err != nil {
		return nil, err
	}
	defer p.stop()
	addr, err := net.ResolveTCPAddr("tcp", p.hello)
	if err != nil {
		return nil, err
	}
	var clients []int
	defer func() { closeAll(clients) }()
	for range straceAccepts {
		fd, err := openClient(0)
		if err != nil {
			return nil, err
		}
		clients = append(clients, fd)
		sa := (&opened{addr: addr}).sockaddr()
		if err := connectAndSend(fd, sa); err != nil {
			return nil, err
		}
	}
	if _, err := p.ask("accept"); err != nil {
		return nil, err
	}
	p.stop()
	return countCalls(out)
}

// countCalls counts what the thread that wrote the marks called between them.
func countCalls(file string) (map[string]int, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	counts := make(map[string]int)
	thread, marks := "", 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		pid, call, ok := strings.Cut(lines.Text(), " ")
		call = strings.TrimSpace(call)
		if !ok {
			continue
		}
		if strings.HasPrefix(call, "write("+strconv.Itoa(marker)+",") {
			thread = pid
			marks++
			continue
		}
		name, _, isCall := strings.Cut(call, "(")
		if marks != 1 || pid != thread || !isCall || strings.HasPrefix(call, "<...") || strings.HasPrefix(call, "---") {
			continue
		}
		switch name {
		case "futex", "nanosleep", "madvise", "mmap", "tgkill", "getpid", "rt_sigreturn", "rt_sigprocmask", "sched_yield":
			continue // the runtime's, now and then
		}
		counts[name]++
	}
	if marks != 2 {
		return nil, fmt.Errorf("%d marks in strace's output where 2 were to be", marks)
	}
	return counts, nil
}

func measureSyscalls(_ *options, t *Table) error {
	t.About = fmt.Sprintf("System calls of the accepting thread for each Accept, counted by strace over %d waiting connections.", straceAccepts)
	t.Key, t.Columns = "listener", []string{"per Accept", "which"}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skipped = "strace isn't installed (Debian: apt-get install strace)"
		return nil
	}
	for _, name := range acceptPeers {
		counts, err := traced(strace, name)
		if err != nil && name == nameNet {
			// Not every place lets a process trace another.
			t.Skipped = "strace can't: " + err.Error()
			return nil
		}
		if err != nil {
			return named(name, err)
		}
		total := 0
		var which []string
		for call, n := range counts {
			total += n
			each := call
			if n != straceAccepts {
				each = fmt.Sprintf("%.4g %s", float64(n)/straceAccepts, call)
			}
			which = append(which, each)
		}
		sort.Strings(which)
		per := float64(total) / straceAccepts
		row := t.row(name, num("%.4g", per), cell{text: strings.Join(which, ", ")})
		switch name {
		case nameLB:
			row.exactly("per Accept", per, 4)
		case nameNet:
			row.exactly("per Accept", per, 8)
		}
	}
	return nil
}
