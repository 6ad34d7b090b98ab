package main

// Processes of a handoff: what they cost when there are many, and how soon the queue of a
// killed one is answered.

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// buildMember builds the program of the processes.
func buildMember() (program string, done func(), err error) {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return "", nil, err
	}
	done = func() { os.RemoveAll(dir) }
	program = filepath.Join(dir, "member")
	if err := command("go", "build", "-o", program, "./member"); err != nil {
		done()
		return "", nil, err
	}
	return program, done, nil
}

// members starts processes, has them all listen in one instant, and returns how long each
// Listen took.
func members(n int, program, path, addr string, megabytes int) (ps []*process, took []float64, err error) {
	for range n {
		p, err := launch(exec.Command(program, path, addr, strconv.Itoa(megabytes)), (*exec.Cmd).Start)
		if err != nil {
			return ps, nil, err
		}
		ps = append(ps, p)
	}
	for _, p := range ps {
		fmt.Fprintln(p.in, "go")
	}
	for _, p := range ps {
		line, err := p.read()
		if err != nil {
			return ps, nil, err
		}
		us, _, _ := strings.Cut(line, " ")
		f, _ := strconv.ParseFloat(us, 64)
		took = append(took, f/1000)
	}
	slices.Sort(took)
	return ps, took, nil
}

func stopAll(ps []*process) {
	for _, p := range ps {
		p.kill()
	}
}

// used is the CPU time of a process, in ticks of 10 ms, and its resident memory.
func used(pid int) (ticks, kB int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	pages, _ := strconv.Atoi(f[21])
	return u + s, pages * os.Getpagesize() / 1024
}

func measureProcesses(opt *options, t *Table) error {
	counts, idle := []int{2, 8, 32, 64}, 20*time.Second
	if opt.quick {
		counts, idle = []int{2, 8}, 2*time.Second
	}
	t.About = "So many processes of a handoff, each with one listener of the same address, that call Listen in one instant: how long Listen took, what all use of a core when nothing happens, and what each of them has."
	t.Key, t.Columns = "processes", []string{"ms a Listen, median", "slowest", "% of a core, all, idle", "descriptors", "MB"}
	program, done, err := buildMember()
	if err != nil {
		return err
	}
	defer done()
	for _, n := range counts {
		if err := measureProcessesOf(n, program, idle, t); err != nil {
			return err
		}
	}
	median, slowest := Series{Name: "median"}, Series{Name: "slowest"}
	for i, n := range counts {
		for column, s := range []*Series{&median, &slowest} {
			s.X, s.Y = append(s.X, float64(n)), append(s.Y, t.Rows[i].Values[column]*1e6) // ns
		}
	}
	t.Series = []Series{median, slowest}
	t.Notes = append(t.Notes, fmt.Sprintf("The slowest Listen grows with the number of processes to the power of %.2f: each has a link to each other one.", exponent(slowest.X, slowest.Y)))
	return nil
}

func measureProcessesOf(n int, program string, idle time.Duration, t *Table) error {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "handoff")
	first, took, err := members(1, program, path, anyPort, 0)
	defer stopAll(first)
	if err != nil {
		return err
	}
	addr, err := addressOf(first[0])
	if err != nil {
		return err
	}
	ps, more, err := members(n-1, program, path, addr, 0)
	defer stopAll(ps)
	if err != nil {
		return err
	}
	took = append(took, more...)
	slices.Sort(took)
	time.Sleep(3 * time.Second)
	all := append(first, ps...)
	for _, p := range all {
		if on, err := p.ask("info"); err != nil || !strings.Contains(on, "handoff") {
			return fmt.Errorf("a process of %d isn't handed off: %s %v", n, on, err)
		}
	}
	ticks := func() (sum int) {
		for _, p := range all {
			u, _ := used(p.cmd.Process.Pid)
			sum += u
		}
		return sum
	}
	before := ticks()
	time.Sleep(idle)
	percent := float64(ticks()-before) / idle.Seconds() // a tick is a hundredth of a second
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", all[0].cmd.Process.Pid))
	_, kB := used(all[0].cmd.Process.Pid)
	row := t.row(fmt.Sprint(n), num("%.1f", took[len(took)/2]), num("%.1f", took[len(took)-1]), num("%.2f", percent), num("%.0f", float64(len(entries))), num("%.1f", float64(kB)/1024))
	if n == 64 {
		row.atMost("slowest Listen, ms", took[len(took)-1], 300)
		row.atMost("% of a core, all, idle", percent, 1)
	}
	return nil
}

// addressOf finds the port on which a process listens.
func addressOf(p *process) (string, error) {
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return "", err
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		return "", err
	}
	own := make(map[string]bool)
	for _, e := range entries {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.cmd.Process.Pid, e.Name()))
		own[to] = true
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) > 9 && f[3] == "0A" && own["socket:["+f[9]+"]"] {
			port, err := strconv.ParseUint(f[1][len(f[1])-4:], 16, 16)
			return fmt.Sprintf("127.0.0.1:%d", port), err
		}
	}
	return "", fmt.Errorf("process %d doesn't listen", p.cmd.Process.Pid)
}

func measureTakeOver(opt *options, t *Table) error {
	times := 200
	if opt.quick {
		times = 10
	}
	t.About = fmt.Sprintf("%d times one of two processes of a handoff is killed while connections are queued in its socket: from SIGKILL to the first answer that a client of its queue gets, and to the end of a pipe that the dead one held: "+
		"the kernel frees its memory before it closes what it had, and before that nobody hears of its death.", times)
	t.Key, t.Columns = "killed", []string{"ms, median", "most", "the pipe's end, median", "tried", "lost"}
	program, done, err := buildMember()
	if err != nil {
		return err
	}
	defer done()
	for _, megabytes := range []int{0, 100} {
		var took, ended []float64
		tried, lost := 0, 0
		for range times {
			k, err := takeOver(program, megabytes)
			if err != nil {
				return err
			}
			took, ended = append(took, k.answered), append(ended, k.ended)
			tried, lost = tried+k.tried, lost+k.lost
		}
		slices.Sort(took)
		slices.Sort(ended)
		name := "a program that only listens"
		if megabytes > 0 {
			name = fmt.Sprintf("one with %d MB of memory", megabytes)
		}
		row := t.row(name, num("%.2f", took[len(took)/2]), num("%.2f", took[len(took)-1]), num("%.2f", ended[len(ended)/2]), num("%.0f", float64(tried)), num("%.0f", float64(lost)))
		if megabytes == 0 {
			row.atMost("ms, median", took[len(took)/2], 1)
			row.atMost("ms, most", took[len(took)-1], 10)
		}
		row.atMost("lost", float64(lost), 0)
	}
	return nil
}

// A killing is what came of one: how many ms after it a client of the queue was answered
// first, and the dead one's pipe ended.
type killing struct {
	answered, ended float64
	tried, lost     int
}

func takeOver(program string, megabytes int) (k killing, err error) {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return k, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "handoff")
	dead, _, err := members(1, program, path, anyPort, megabytes)
	defer stopAll(dead)
	if err != nil {
		return k, err
	}
	addr, err := addressOf(dead[0])
	if err != nil {
		return k, err
	}
	heir, _, err := members(1, program, path, addr, 0)
	defer stopAll(heir)
	if err != nil {
		return k, err
	}
	if _, err := heir[0].ask("accept"); err != nil {
		return k, err
	}
	var queued []net.Conn
	for len(queued) < 4 {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return k, err
		}
		defer c.Close()
		c.(*net.TCPConn).SetLinger(0)
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			queued = append(queued, c)
		}
	}
	type answer struct {
		after float64
		err   error
	}
	answers, end := make(chan answer, len(queued)), make(chan float64, 1)
	var began time.Time
	since := func() float64 { return time.Since(began).Seconds() * 1000 }
	killed := make(chan struct{})
	for _, c := range queued {
		go func() {
			_, err := io.ReadFull(c, make([]byte, 1))
			<-killed
			answers <- answer{since(), err}
		}()
	}
	go func() {
		dead[0].read()
		<-killed
		end <- since()
	}()
	time.Sleep(time.Millisecond)
	began = time.Now()
	close(killed)
	if err := dead[0].cmd.Process.Kill(); err != nil {
		return k, err
	}
	for range queued {
		switch a := <-answers; {
		case a.err != nil:
			k.lost++
		case k.answered == 0 || a.after < k.answered:
			k.answered = a.after
		}
	}
	k.tried, k.ended = len(queued), <-end
	return k, nil
}
