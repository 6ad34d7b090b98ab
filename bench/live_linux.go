package main

// What whole connections cost a server: it accepts and closes as fast as a client
// in another process connects.

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// serveLive accepts and closes, and tells how much CPU time it has used for how
// many connections. Its arguments are a contender and how many loops.
func serveLive(p *childSide) error {
	loops, err := strconv.Atoi(p.args[1])
	if err != nil {
		return err
	}
	o, err := contenders[p.args[0]].open(loops)
	if err != nil {
		return err
	}
	defer o.close()
	counts := make([]struct {
		n atomic.Int64
		_ [120]byte // a cache line of its own, and the one fetched with it
	}, loops)
	for i, ln := range o.lns {
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				counts[i].n.Add(1)
				c.Close()
			}
		}()
	}
	p.say(o.addr.String())
	for {
		if _, ok := p.asked(); !ok {
			return nil
		}
		n := int64(0)
		for i := range counts {
			n += counts[i].n.Load()
		}
		p.say(fmt.Sprint(usage().Nanoseconds(), " ", n))
	}
}

// burst is for how long a server is loaded at a time.
const burst = 50 * time.Millisecond

// floods are the threads of the client: fewer don't saturate a server, which then
// falls asleep and is woken for each connection.
var floods = 2 * runtime.NumCPU()

// saturate floods a server for a time.
func saturate(sa *unix.SockaddrInet4, d time.Duration) (err error) {
	until := time.Now().Add(d)
	errs := make(chan error, floods)
	for range floods {
		go func() { errs <- flood(sa, 64, until) }()
	}
	for range floods {
		if e := <-errs; e != nil {
			err = e
		}
	}
	return err
}

// liveServer is a contender with so many accept loops.
type liveServer struct {
	name  string
	loops int
}

func (s liveServer) title() string {
	if s.loops == 1 {
		return s.name
	}
	if s.name == nameNet {
		return s.name + ", 1 for 4 loops"
	}
	return fmt.Sprintf("%s x%d", s.name, s.loops)
}

// liveProbe is a probe of a server in a process of its own.
func liveProbe(s liveServer) (probe, *process, error) {
	p, err := start("live", s.name, strconv.Itoa(s.loops))
	if err != nil {
		return probe{}, nil, err
	}
	addr, err := net.ResolveTCPAddr("tcp", p.hello)
	if err != nil {
		p.stop()
		return probe{}, nil, err
	}
	sa := (&opened{addr: addr}).sockaddr()
	ask := func() (cpu time.Duration, n int, err error) {
		answer, err := p.ask("usage")
		if err == nil {
			_, err = fmt.Sscan(answer, &cpu, &n)
		}
		return cpu, n, err
	}
	return probe{s.title(), func() (took time.Duration, n int, err error) {
		cpu0, n0, err := ask()
		if err != nil {
			return 0, 0, err
		}
		if err := saturate(sa, burst); err != nil {
			return 0, 0, err
		}
		cpu1, n1, err := ask()
		return cpu1 - cpu0, n1 - n0, err
	}}, p, nil
}

// live measures servers interleaved, each in a process of its own that sleeps
// while others are measured.
func live(opt *options, servers []liveServer) (names []string, c costs, done func(), err error) {
	var processes []*process
	done = func() {
		for _, p := range processes {
			p.stop()
		}
	}
	var probes []probe
	for _, s := range servers {
		pr, p, err := liveProbe(s)
		if err != nil {
			return nil, nil, done, named(s.title(), err)
		}
		processes = append(processes, p)
		probes = append(probes, pr)
		names = append(names, s.title())
	}
	longer := *opt
	if !opt.quick {
		longer.blocks, longer.blockCPU = 21, 3*opt.blockCPU // live figures scatter more
	}
	c, err = compare(&longer, probes)
	return names, c, done, err
}

func measureLive(opt *options, t *Table) error {
	t.About = "Connect, accept, close, as fast as it goes: CPU time of the server's process for each connection. The client is another process. " +
		"fasthttp/reuseport isn't here, because its TCP_DEFER_ACCEPT hands out no connection without data. " +
		"A process of a handoff waits for others too. For one that waits for more than its listener, as any server in use does, Go wakes a thread with each connection that is accepted: the last four rows."
	t.Key, t.Columns = "server", []string{"us of CPU", "vs net", "vs 4 go-reuseport", "vs net that waits", "vs 2 go-reuseport that wait", "vs net, blocks"}
	servers := []liveServer{{nameNet, 1}, {nameLean, 1}, {nameLB, 1}, {nameGoReuse, 4}, {nameKavu, 4}, {nameLean, 4}, {nameLB, 4}, {nameNetWaits, 1}, {nameReuseOf2, 1}, {namePeer, 1}, {nameKept, 1}}
	names, c, done, err := live(opt, servers)
	defer done()
	if err != nil {
		return err
	}
	one, four := liveServer{nameLB, 1}.title(), liveServer{nameLB, 4}.title()
	base, reuse := liveServer{nameNet, 1}.title(), liveServer{nameGoReuse, 4}.title()
	b, r := slices.Index(names, base), slices.Index(names, reuse)
	waits, two := slices.Index(names, nameNetWaits), slices.Index(names, nameReuseOf2)
	for i, name := range names {
		row := t.row(name, num("%.2f", c.median(i)/1e3), num("%.2f", c.ratio(i, b)), num("%.2f", c.ratio(i, r)), num("%.2f", c.ratio(i, waits)), num("%.2f", c.ratio(i, two)), c.spread(i, b))
		switch name {
		case one:
			row.atMost("vs net", c.ratio(i, b), 0.90)
		case namePeer:
			row.atMost("vs 2 go-reuseport that wait", c.ratio(i, two), 0.92)
		case nameKept:
			row.atMost("vs net that waits", c.ratio(i, waits), 0.92)
		case four:
			row.atMost("vs 4 go-reuseport", c.ratio(i, r), 0.95)
		}
	}
	return nil
}

func measureDispatchLive(opt *options, t *Table) error {
	t.About = "The same load on four accept loops: the dispatcher with four members, against one net.Listen that four goroutines share."
	t.Key, t.Columns = "server", []string{"us of CPU", "vs net, 1 for 4 loops", "blocks"}
	servers := []liveServer{{nameNet, 4}, {nameDispatcher, 4}, {nameLB, 4}}
	names, c, done, err := live(opt, servers)
	defer done()
	if err != nil {
		return err
	}
	b := slices.Index(names, servers[0].title())
	for i, name := range names {
		row := t.row(name, num("%.2f", c.median(i)/1e3), num("%.2f", c.ratio(i, b)), c.spread(i, b))
		if name == servers[1].title() {
			row.atMost("vs net, 1 for 4 loops", c.ratio(i, b), 1.0)
		}
	}
	return nil
}
