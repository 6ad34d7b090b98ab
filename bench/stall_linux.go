package main

// What clients see when one of four accept loops stalls half of the time, as one
// does that waits for a lock, a disk or a slow answer.

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// stall is how long the first loop stalls, every second time.
const stall = 100 * time.Millisecond

// serveStall answers each connection with a byte and closes it. Its argument is a
// contender.
func serveStall(p *childSide) error {
	o, err := contenders[p.args[0]].open(4)
	if err != nil {
		return err
	}
	defer o.close()
	began := time.Now()
	for i, ln := range o.lns {
		go func() {
			for {
				if at := time.Since(began) % (2 * stall); i == 0 && at < stall {
					time.Sleep(stall - at)
				}
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Write([]byte{'x'})
				c.Close()
			}
		}()
	}
	p.say(o.addr.String())
	p.awaitEnd()
	return nil
}

// latencies connects so often a second for so long, however slow the answers are,
// and returns how long each answer took.
func latencies(addr string, rate int, during time.Duration) ([]time.Duration, error) {
	var (
		mu     sync.Mutex
		took   []time.Duration
		failed error
		all    sync.WaitGroup
	)
	once := func() (time.Duration, error) {
		began := time.Now()
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		c.(*net.TCPConn).SetLinger(0)
		c.SetDeadline(began.Add(10 * time.Second))
		_, err = io.ReadFull(c, make([]byte, 1))
		return time.Since(began), err
	}
	sent := 0
	for began := time.Now(); time.Since(began) < during; time.Sleep(500 * time.Microsecond) {
		for ; sent < int(float64(rate)*time.Since(began).Seconds()); sent++ {
			all.Add(1)
			go func() {
				defer all.Done()
				d, err := once()
				mu.Lock()
				defer mu.Unlock()
				took = append(took, d)
				if err != nil {
					failed = err
				}
			}()
		}
	}
	all.Wait()
	return took, failed
}

func measureStall(opt *options, t *Table) error {
	const rate = 2000
	rounds, during := 3, 4*time.Second
	if opt.quick {
		rounds, during = 1, time.Second
	}
	t.About = fmt.Sprintf("Four accept loops, of which one stalls for %v, works for %v, and so on. %d connections a second, each answered with a byte: how long clients wait from connect to the answer. "+
		"A loop stalls between two Accepts; what the kernel gave its listener waits.", stall, stall, rate)
	t.Key, t.Columns = "listeners", []string{"connections", "p50 ms", "p99 ms", "max ms", "% > 1 ms", "% > 10 ms", "% > 50 ms"}
	type server struct {
		title, name string
		bar         float64
		p           *process
		took        []time.Duration
	}
	var servers []*server
	for _, s := range []*server{
		{title: "go-reuseport x4", name: nameGoReuse},
		{title: "lblisten x4, kernel's hash", name: nameLB},
		{title: "lblisten x4, kernel, SteerLoad", name: nameLoad, bar: 0.5},
		{title: "lblisten x4, dispatcher", name: nameDispatcher, bar: 0.2},
	} {
		p, err := start("stall", s.name)
		if err != nil && s.name == nameLoad {
			t.skip(s.title, err) // it takes a privilege
			continue
		}
		if err != nil {
			return named(s.title, err)
		}
		defer p.stop()
		s.p = p
		servers = append(servers, s)
	}
	for range rounds {
		for _, i := range rand.Perm(len(servers)) {
			took, err := latencies(servers[i].p.hello, rate, during)
			if err != nil {
				return named(servers[i].title, err)
			}
			servers[i].took = append(servers[i].took, took...)
		}
	}
	for _, s := range servers {
		slices.Sort(s.took)
		slower := func(ms float64) float64 { // share in per cent
			i, _ := slices.BinarySearch(s.took, time.Duration(ms*float64(time.Millisecond))+1)
			return 100 * float64(len(s.took)-i) / float64(len(s.took))
		}
		ms := func(q float64) float64 { return float64(quantile(s.took, q)) / float64(time.Millisecond) }
		row := t.row(s.title, num("%.0f", float64(len(s.took))), num("%.2f", ms(0.5)), num("%.2f", ms(0.99)), num("%.1f", ms(1)),
			num("%.2f", slower(1)), num("%.2f", slower(10)), num("%.2f", slower(50)))
		if s.bar > 0 {
			row.atMost("% > 50 ms", slower(50), s.bar)
		}
		line := Series{Name: s.title}
		for x := 0.05; x <= 205; x *= math.Pow(10, 1.0/40) {
			line.X = append(line.X, x)
			line.Y = append(line.Y, slower(x))
		}
		t.Series = append(t.Series, line)
	}
	return nil
}
