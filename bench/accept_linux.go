package main

// What an Accept costs from a queue that is never empty: nothing waits, so all
// that is measured is the work of accepting.

import (
	"fmt"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"
)

// taken is what a batch has accepted, until it is over.
type taken struct {
	conns []net.Conn
	fds   []int
}

func (t *taken) drop() {
	for _, c := range t.conns {
		c.Close()
	}
	closeAll(t.fds)
	t.conns, t.fds = t.conns[:0], t.fds[:0]
}

// take accepts n connections from listener i.
func (o *opened) take(t *taken, i, n int) error {
	if o.rawFD >= 0 {
		for range n {
			// Not x/sys/unix's, which costs a getsockopt more.
			fd, _, err := syscall.Accept4(o.rawFD, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
			if err != nil {
				return err
			}
			t.fds = append(t.fds, fd)
		}
		return nil
	}
	ln := o.lns[i]
	for range n {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		t.conns = append(t.conns, c)
	}
	return nil
}

// oneThread is a probe of Accept by one goroutine: thread CPU.
func oneThread(name string, o *opened) probe {
	t := &taken{conns: make([]net.Conn, 0, queueSize), fds: make([]int, 0, queueSize)}
	return probe{name, func() (cpu time.Duration, n int, err error) {
		clients, err := fill(o, queueSize)
		if err != nil {
			return 0, 0, err
		}
		defer closeAll(clients)
		defer t.drop()
		shares := []int{queueSize}
		if len(o.lns) > 1 {
			if shares, err = o.shares(); err != nil {
				return 0, 0, err
			}
		}
		runtime.GC() // so that memory is used again, as a server's is, and not new to the system
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		began := threadCPU()
		for i, n := range shares {
			if err := o.take(t, i, n); err != nil {
				return 0, 0, err
			}
		}
		return threadCPU() - began, queueSize, nil
	}}
}

// manyLoops is a probe of Accept by one goroutine for each listener: process CPU,
// in which the clients aren't, because they have connected before.
func manyLoops(name string, o *opened) probe {
	kept := make([]taken, len(o.lns))
	return probe{name, func() (cpu time.Duration, n int, err error) {
		clients, err := fill(o, queueSize)
		if err != nil {
			return 0, 0, err
		}
		defer closeAll(clients)
		shares, err := o.shares()
		if err != nil {
			return 0, 0, err
		}
		errs := make([]error, len(shares))
		var all sync.WaitGroup
		all.Add(len(shares))
		began := processCPU()
		for i, n := range shares {
			go func() {
				defer all.Done()
				errs[i] = o.take(&kept[i], i, n)
			}()
		}
		all.Wait()
		cpu = processCPU() - began
		for i := range kept {
			kept[i].drop()
			if errs[i] != nil {
				err = errs[i]
			}
		}
		return cpu, queueSize, err
	}}
}

// withoutGC keeps the collector out of what f measures, but for a rare run: it
// would hit whoever is measured at the time. All contenders that return a net.Conn
// allocate the same.
func withoutGC(f func() error) error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(256 << 20))
	return f()
}

// acceptPeers are who is compared where one goroutine accepts.
var acceptPeers = []string{nameNet, nameMPTCP, nameGoReuse, nameFasthttp, nameKavu, nameTableflip,
	nameLB, nameDispatcher, nameHandoff, nameLean, nameRaw}

// openAll opens n listeners of each contender.
func openAll(n int, names ...string) (all []*opened, done func(), err error) {
	done = func() {
		for _, o := range all {
			o.close()
		}
	}
	for _, name := range names {
		o, err := contenders[name].open(n)
		if err != nil {
			done()
			return nil, nil, named(name, err)
		}
		all = append(all, o)
	}
	return all, done, nil
}

// compare measures probes interleaved.
func compare(opt *options, probes []probe) (c costs, err error) {
	err = withoutGC(func() error {
		c, err = interleave(probes, opt.blocks, opt.blockCPU)
		return err
	})
	return c, err
}

func measureAccept(opt *options, t *Table) error {
	t.About = fmt.Sprintf("One goroutine accepts %d waiting connections: time and memory for each. The bytes and allocations are counted exactly, and are net's.", queueSize)
	t.Key, t.Columns = "listener", []string{"ns", "B", "allocs"}
	names := []string{nameNet, nameGoReuse, nameLB, nameHandoff, nameDispatcher, nameLean, nameRaw}
	all, done, err := openAll(1, names...)
	if err != nil {
		return err
	}
	defer done()
	rounds := 20
	if opt.quick {
		rounds = 5
	}
	type result struct {
		ns            []float64
		bytes, allocs uint64
	}
	results := make([]result, len(names))
	err = withoutGC(func() error {
		for round := range rounds {
			for i, o := range all {
				clients, err := fill(o, queueSize)
				if err != nil {
					return named(names[i], err)
				}
				kept := &taken{conns: make([]net.Conn, 0, queueSize), fds: make([]int, 0, queueSize)}
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				began := time.Now()
				err = o.take(kept, 0, queueSize)
				took := time.Since(began)
				runtime.ReadMemStats(&after)
				kept.drop()
				closeAll(clients)
				if err != nil {
					return named(names[i], err)
				}
				r := &results[i]
				r.ns = append(r.ns, float64(took.Nanoseconds())/float64(queueSize))
				// The runtime allocates in the background now and then: the least is
				// Accept's own.
				bytes, allocs := after.TotalAlloc-before.TotalAlloc, after.Mallocs-before.Mallocs
				if round == 0 || bytes < r.bytes {
					r.bytes = bytes
				}
				if round == 0 || allocs < r.allocs {
					r.allocs = allocs
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	each := func(n uint64) float64 { return float64(n / uint64(queueSize)) }
	for i, name := range names {
		r := results[i]
		row := t.row(name, num("%.0f", median(r.ns)), num("%.0f", each(r.bytes)), num("%.0f", each(r.allocs)))
		if name == nameLB || name == nameHandoff || name == nameDispatcher {
			row.exactly("B", each(r.bytes), each(results[0].bytes))
			row.exactly("allocs", each(r.allocs), each(results[0].allocs))
		}
	}
	return nil
}

func measureAcceptInterleaved(opt *options, t *Table) error {
	t.About = fmt.Sprintf("One goroutine accepts %d waiting connections: CPU time of its thread for each, and its ratio to others' in the same run. "+
		"\"received\" is a socket that another process had opened, which was killed. \"lean\" is written by hand with package net, for what lblisten does by itself.", queueSize)
	t.Key, t.Columns = "listener", []string{"ns of CPU", "vs net", "vs go-reuseport", "vs net, blocks"}
	names := acceptPeers
	all, done, err := openAll(1, names...)
	if err != nil {
		return err
	}
	defer done()
	var probes []probe
	for i, o := range all {
		probes = append(probes, oneThread(names[i], o))
	}
	longer := *opt
	if !opt.quick {
		// The medians of less scatter by more than they are from the bar.
		longer.blocks, longer.blockCPU = 41, 2*opt.blockCPU
	}
	c, err := compare(&longer, probes)
	if err != nil {
		return err
	}
	base, reuse := slices.Index(names, nameNet), slices.Index(names, nameGoReuse)
	for i, name := range names {
		vsNet, vsReuse := c.ratio(i, base), c.ratio(i, reuse)
		row := t.row(name, num("%.0f", c.median(i)), num("%.2f", vsNet), num("%.2f", vsReuse), c.spread(i, base))
		if name == nameLB {
			row.atMost("vs net", vsNet, 0.78)
			row.atMost("vs go-reuseport", vsReuse, 0.78)
		}
	}
	return nil
}

func measureFastPath(opt *options, t *Table) error {
	t.About = "What lblisten's Accept adds to that of package net's listener with the same socket options, thread CPU as above."
	t.Key, t.Columns = "listener", []string{"ns of CPU", "vs lean", "vs lean, blocks"}
	names := []string{nameLean, nameLB}
	all, done, err := openAll(1, names...)
	if err != nil {
		return err
	}
	defer done()
	longer := *opt
	if !opt.quick {
		longer.blocks, longer.blockCPU = 15, 2*opt.blockCPU // the difference is small
	}
	c, err := compare(&longer, []probe{oneThread(nameLean, all[0]), oneThread(nameLB, all[1])})
	if err != nil {
		return err
	}
	for i, name := range names {
		row := t.row(name, num("%.0f", c.median(i)), num("%.3f", c.ratio(i, 0)), c.spread(i, 0))
		if name == nameLB {
			row.atMost("vs lean", c.ratio(i, 0), 1.02)
		}
	}
	return nil
}

func measureAccept4(opt *options, t *Table) error {
	t.About = fmt.Sprintf("Four goroutines accept %d waiting connections, from four listeners of one address or from one that they share: CPU time of the process for each.", queueSize)
	t.Key, t.Columns = "listeners", []string{"ns of CPU", "vs 4 go-reuseport", "vs go-reuseport, blocks"}
	names := []string{nameNet, nameGoReuse, nameFasthttp, nameKavu, nameLB, nameDispatcher, nameLean}
	all, done, err := openAll(4, names...)
	if err != nil {
		return err
	}
	defer done()
	var probes []probe
	for i, o := range all {
		probes = append(probes, manyLoops(names[i], o))
	}
	c, err := compare(opt, probes)
	if err != nil {
		return err
	}
	base := slices.Index(names, nameGoReuse)
	for i, name := range names {
		row := t.row(times4(name, all[i]), num("%.0f", c.median(i)), num("%.2f", c.ratio(i, base)), c.spread(i, base))
		if name == nameLB {
			row.atMost("vs 4 go-reuseport", c.ratio(i, base), 0.85)
		}
	}
	return nil
}

// times4 says how a contender has four accept loops.
func times4(name string, o *opened) string {
	if len(o.lns) == 4 && o.lns[0] == o.lns[3] {
		return name + ", 1 for 4 loops"
	}
	return name + " x4"
}
