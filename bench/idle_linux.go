package main

// What listeners cost while nothing happens.

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"time"

	"github.com/lblisten/lblisten"
)

// serveIdle has so many listeners, in each of which an Accept waits. It tells how many
// bytes of memory each takes, and how much CPU time the process has used.
func serveIdle(p *childSide) error {
	n, err := strconv.Atoi(p.args[0])
	if err != nil {
		return err
	}
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := memory()
	g, err := lblisten.ListenGroup(context.Background(), "tcp", anyPort, n, lblisten.WithRequireKernel())
	if err != nil {
		return err
	}
	defer g.Close()
	for _, l := range g.Listeners() {
		go l.Accept()
	}
	time.Sleep(200 * time.Millisecond)
	p.say(fmt.Sprint((memory() - before) / uint64(n)))
	for {
		if _, ok := p.asked(); !ok {
			return nil
		}
		p.say(fmt.Sprint(usage().Nanoseconds()))
	}
}

func measureIdle(opt *options, t *Table) error {
	counts, idle := []int{1, 100, 3000}, 20*time.Second
	if opt.quick {
		counts, idle = []int{1, 100}, time.Second
	}
	t.About = fmt.Sprintf("Listeners of one address, balanced by the kernel, in each of which an Accept waits: what the process uses of a core in %v in which nothing happens, and the memory of each listener with its goroutine.", idle)
	t.Key, t.Columns = "listeners", []string{"% of a core", "bytes each"}
	for _, n := range counts {
		p, err := start("idle", strconv.Itoa(n))
		if err != nil {
			return err
		}
		defer p.stop()
		bytes, err := strconv.ParseFloat(p.hello, 64)
		if err != nil {
			return err
		}
		used := func() (d time.Duration, err error) {
			answer, err := p.ask("usage")
			if err == nil {
				_, err = fmt.Sscan(answer, &d)
			}
			return d, err
		}
		time.Sleep(time.Second)
		before, err := used()
		if err != nil {
			return err
		}
		time.Sleep(idle)
		after, err := used()
		if err != nil {
			return err
		}
		percent := 100 * (after - before).Seconds() / idle.Seconds()
		row := t.row(fmt.Sprint(n), num("%.3f", percent), num("%.0f", bytes))
		if n == 3000 {
			row.atMost("% of a core", percent, 0.1)
			row.atMost("bytes each", bytes, 6500)
		}
		p.stop()
	}
	return nil
}
