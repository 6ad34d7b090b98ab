package main

// What a connection costs the processes of a handoff when some of them have ended, whose
// sockets the others serve.

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/lblisten/lblisten"
)

// serveScale accepts and closes, and tells how much CPU time it has used for how many
// connections. Its arguments are the handoff and the address.
func serveScale(p *childSide) error {
	ln, err := lblisten.Listen("tcp", p.args[1], lblisten.WithHandoff(p.args[0]))
	if err != nil {
		return err
	}
	var n atomic.Int64
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			c.Close()
		}
	}()
	p.say(ln.Addr().String())
	for {
		if _, ok := p.asked(); !ok {
			return ln.Close()
		}
		p.say(fmt.Sprint(usage().Nanoseconds(), " ", n.Load()))
	}
}

func measureScaleDown(opt *options, t *Table) error {
	const all, rest = 8, 4
	t.About = fmt.Sprintf("Connect, accept, close, as fast as it goes, at %d processes of a handoff with a listener each; then %d of them close, and the others serve their sockets too. CPU time of all processes for each connection.", all, all-rest)
	t.Key, t.Columns = "processes", []string{"us of CPU", "vs before"}
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var ps []*process
	defer func() {
		for _, p := range ps {
			p.stop()
		}
	}()
	addr := anyPort
	for range all {
		p, err := start("scale", filepath.Join(dir, "handoff"), addr)
		if err != nil {
			return err
		}
		ps = append(ps, p)
		addr = ps[0].hello
	}
	before, err := costOf(opt, ps, addr)
	if err != nil {
		return err
	}
	for _, p := range ps[rest:] {
		p.stop()
	}
	after, err := costOf(opt, ps[:rest], addr)
	if err != nil {
		return err
	}
	t.row(fmt.Sprint(all), num("%.2f", before), num("%.2f", 1))
	t.row(fmt.Sprintf("%d of %d", rest, all), num("%.2f", after), num("%.2f", after/before)).atMost("vs before", after/before, 1.5)
	return nil
}

// costOf is the median of the CPU time that a connection costs some processes, in us.
func costOf(opt *options, ps []*process, addr string) (float64, error) {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return 0, err
	}
	sa := (&opened{addr: a}).sockaddr()
	used := func() (cpu, n int, err error) {
		for _, p := range ps {
			answer, err := p.ask("usage")
			if err != nil {
				return 0, 0, err
			}
			var c, m int
			if _, err := fmt.Sscan(answer, &c, &m); err != nil {
				return 0, 0, err
			}
			cpu, n = cpu+c, n+m
		}
		return cpu, n, nil
	}
	var costs []float64
	for range opt.blocks {
		cpu0, n0, err := used()
		if err != nil {
			return 0, err
		}
		if err := saturate(sa, 4*burst); err != nil {
			return 0, err
		}
		cpu1, n1, err := used()
		if err != nil {
			return 0, err
		}
		costs = append(costs, float64(cpu1-cpu0)/float64(n1-n0)/1000)
	}
	slices.Sort(costs)
	return costs[len(costs)/2], nil
}
