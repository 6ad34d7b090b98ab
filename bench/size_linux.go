package main

// How cost grows with the number of members and of accepting goroutines, and what
// ten thousand members that come and go cost.

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/lblisten/lblisten"
)

// balancers are the two that a group can have here.
var balancers = []struct {
	name   string
	option lblisten.Option
}{
	{"kernel", lblisten.WithRequireKernel()},
	{"dispatcher", lblisten.WithDispatcher()},
}

// steepest is what may be called linear: noise tilts a line a little.
const steepest = 1.1

func powers(to int) (n []int) {
	for i := 1; i <= to; i *= 2 {
		n = append(n, i)
	}
	return n
}

func floats(n []int) (f []float64) {
	for _, i := range n {
		f = append(f, float64(i))
	}
	return f
}

// joinAndLeave times the last of n members as it joins, leaves and joins again,
// which on the kernel's side adopts a socket instead of opening one. In
// microseconds.
func joinAndLeave(n int, option lblisten.Option) (join, leave, again float64, err error) {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", anyPort, max(1, n-1), option)
	if err != nil {
		return 0, 0, 0, err
	}
	defer g.Close()
	addr := g.Addr().String()
	timed := func(f func() error) float64 {
		began := time.Now()
		if e := f(); e != nil && err == nil {
			err = e
		}
		return float64(time.Since(began).Nanoseconds()) / 1e3
	}
	var ln net.Listener
	listen := func() (e error) {
		ln, e = lblisten.Listen("tcp", addr, option)
		return e
	}
	if n == 1 { // the first member opens the group, and ends it
		g.Close()
		join = timed(listen)
		if err != nil {
			return 0, 0, 0, err
		}
		leave = timed(ln.Close)
		again = timed(listen)
	} else {
		join = timed(listen)
		if err != nil {
			return 0, 0, 0, err
		}
		leave = timed(ln.Close)
		again = timed(listen)
	}
	if err != nil {
		return 0, 0, 0, err
	}
	return join, leave, again, ln.Close()
}

func measureMembers(opt *options, t *Table) error {
	t.About = "One more member joins, leaves, and joins again (which adopts the socket that was left): elapsed time; with one member that opens the group and ends it. Accept by one goroutine that goes through all members' queues: thread CPU. " +
		"Choice: Dispatch of a listener without system calls, whose members all wait, one connection at a time, so that a goroutine or two have to be woken for each: process CPU. " +
		"The growth is the slope from 16 to 256 members in double logarithmic scale: 0 is constant, 1 is linear."
	t.Key = "members"
	sizes := powers(256)
	rounds := 15
	accept := options{blocks: 3, blockCPU: 20 * time.Millisecond}
	if opt.quick {
		sizes, rounds, accept = []int{1, 16, 64}, 2, options{blocks: 1, blockCPU: time.Millisecond}
	}
	var all []sized
	for _, by := range balancers {
		join, leave := sized{by.name + ": join", "us", nil}, sized{by.name + ": leave", "us", nil}
		again := sized{by.name + ": join again", "us", nil}
		for _, n := range sizes {
			var j, l, a []float64
			for range rounds {
				joined, left, rejoined, err := joinAndLeave(n, by.option)
				if err != nil {
					return fmt.Errorf("%s, %d members: %w", by.name, n, err)
				}
				j, l, a = append(j, joined), append(l, left), append(a, rejoined)
			}
			join.cost, leave.cost = append(join.cost, median(j)), append(leave.cost, median(l))
			again.cost = append(again.cost, median(a))
		}
		var probes []probe
		for _, n := range sizes {
			o, err := group(by.option)(n)
			if err != nil {
				return err
			}
			defer o.close()
			probes = append(probes, oneThread(by.name, o))
		}
		c, err := compare(&accept, probes)
		if err != nil {
			return err
		}
		all = append(all, join, leave, again, sized{by.name + ": accept", "ns", c.medians()})
	}
	var probes []probe
	for _, n := range sizes {
		choose, done, err := choice(n)
		if err != nil {
			return err
		}
		defer done()
		probes = append(probes, probe{fmt.Sprint(n), choose})
	}
	c, err := compare(&accept, probes)
	if err != nil {
		return err
	}
	growth(t, sizes, 16, append(all, sized{"dispatcher: choice", "ns", c.medians()})...)
	return nil
}

// sized is one kind of cost, by size.
type sized struct {
	name string
	unit string // ns or us
	cost []float64
}

// growth makes a row of each cost, with a column for each size and one for how it
// grows from a size on, and a line for the plot.
func growth(t *Table, sizes []int, from int, costs ...sized) {
	for _, n := range sizes {
		t.Columns = append(t.Columns, fmt.Sprint(n))
	}
	t.Columns = append(t.Columns, "growth")
	first := 0
	for sizes[first] < from {
		first++
	}
	for _, s := range costs {
		line := Series{Name: s.name, X: floats(sizes)}
		var cells []cell
		for _, v := range s.cost {
			cells = append(cells, num("%.0f", v))
			if s.unit == "us" {
				v *= 1e3
			}
			line.Y = append(line.Y, v)
		}
		t.Series = append(t.Series, line)
		slope := exponent(floats(sizes[first:]), s.cost[first:])
		t.row(s.name+", "+s.unit, append(cells, num("%.2f", slope))...).atMost("growth", slope, steepest)
	}
}

func measureGoroutines(opt *options, t *Table) error {
	t.About = fmt.Sprintf("So many goroutines accept %d waiting connections: CPU time of the process for each. net.Listen and lblisten with the kernel are one listener that all share; the dispatcher has four members, which share the goroutines.", queueSize)
	t.Key = "goroutines"
	counts := powers(64)
	accept := options{blocks: 5, blockCPU: 20 * time.Millisecond}
	if opt.quick {
		counts, accept = []int{1, 8, 16}, options{blocks: 1, blockCPU: time.Millisecond}
	}
	var probes []probe
	for _, s := range []struct {
		name      string
		listeners int
	}{{nameNet, 1}, {nameLB, 1}, {nameDispatcher, 4}} {
		o, err := contenders[s.name].open(s.listeners)
		if err != nil {
			return named(s.name, err)
		}
		defer o.close()
		for _, n := range counts {
			shared := &opened{addr: o.addr, rawFD: -1}
			for i := range n {
				shared.lns = append(shared.lns, o.lns[i%len(o.lns)])
			}
			probes = append(probes, manyLoops(fmt.Sprint(s.name, ", ", n), shared))
		}
	}
	c, err := compare(&accept, probes)
	if err != nil {
		return err
	}
	all, n := c.medians(), len(counts)
	growth(t, counts, 4, sized{nameNet, "ns", all[:n]}, sized{"lblisten, kernel", "ns", all[n : 2*n]}, sized{nameDispatcher, "ns", all[2*n:]})
	return nil
}

func measureChurn(opt *options, t *Table) error {
	times := 10000
	if opt.quick {
		times = 500
	}
	t.About = fmt.Sprintf("%d times a member joins a group of four and leaves it again: elapsed time in all, of a join and a leave in the first tenth and in the last, and what is left in the process after that.", times)
	t.Key, t.Columns = "balancer", []string{"s in all", "us, first tenth", "us, last tenth", "descriptors more", "goroutines more"}
	for _, by := range balancers {
		g, err := lblisten.ListenGroup(context.Background(), "tcp", anyPort, 4, by.option)
		if err != nil {
			return named(by.name, err)
		}
		fds, goroutines := openFiles(), runtime.NumGoroutine()
		addr := g.Addr().String()
		began := time.Now()
		var first, last time.Duration
		for i := range times {
			if i == times-times/10 {
				last = time.Since(began)
			}
			ln, err := lblisten.Listen("tcp", addr, by.option)
			if err == nil {
				err = ln.Close()
			}
			if err != nil {
				g.Close()
				return named(by.name, err)
			}
			if i == times/10-1 {
				first = time.Since(began)
			}
		}
		all := time.Since(began)
		perFirst, perLast := first.Seconds()*1e7/float64(times), (all-last).Seconds()*1e7/float64(times)
		row := t.row(by.name, num("%.2f", all.Seconds()), num("%.0f", perFirst), num("%.0f", perLast),
			num("%.0f", float64(openFiles()-fds)), num("%.0f", float64(runtime.NumGoroutine()-goroutines)))
		row.atMost("last tenth / first tenth", perLast/perFirst, 1.5)
		if err := g.Close(); err != nil {
			return err
		}
	}
	return nil
}

func openFiles() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(entries)
}
