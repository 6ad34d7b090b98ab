package main

// Whole HTTP requests, where accepting is a small part of what is done: requests a
// second and latencies by wrk, against net/http in a process of its own.

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"regexp"
	"strconv"
	"time"
)

// serveHTTP serves a contender's listeners with one http.Server. Its arguments are
// a contender and how many listeners.
func serveHTTP(p *childSide) error {
	n, err := strconv.Atoi(p.args[1])
	if err != nil {
		return err
	}
	o, err := contenders[p.args[0]].open(n)
	if err != nil {
		return err
	}
	defer o.close()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "Hello, world\n")
	})}
	for _, ln := range o.lns {
		go srv.Serve(ln)
	}
	p.say(o.addr.String())
	p.awaitEnd()
	return nil
}

// loaded is what wrk says of one round.
type loaded struct {
	rate, p50, p99 float64 // requests/s, ms
	trouble        string  // connections that failed or timed out
}

var (
	wrkRate   = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkP50    = regexp.MustCompile(`\s50%\s+([0-9.]+[a-z]+)`)
	wrkP99    = regexp.MustCompile(`\s99%\s+([0-9.]+[a-z]+)`)
	wrkErrors = regexp.MustCompile(`(Socket errors:.*|Non-2xx.*)`)
)

func wrk(path, addr string, seconds int, keepAlive bool) (l loaded, err error) {
	args := []string{"-t1", "-c32", "-d" + strconv.Itoa(seconds) + "s", "--latency"}
	if !keepAlive {
		args = append(args, "-H", "Connection: close")
	}
	out, err := exec.Command(path, append(args, "http://"+addr+"/")...).CombinedOutput()
	if err != nil {
		return l, fmt.Errorf("wrk: %w: %s", err, out)
	}
	l.trouble = string(wrkErrors.Find(out))
	find := func(re *regexp.Regexp) string {
		if m := re.FindSubmatch(out); m != nil {
			return string(m[1])
		}
		return ""
	}
	ms := func(s string) float64 { // 123.00us, 1.23ms, 1.20s: as Go writes them
		d, e := time.ParseDuration(s)
		err = errors.Join(err, e)
		return float64(d) / float64(time.Millisecond)
	}
	rate, e := strconv.ParseFloat(find(wrkRate), 64)
	l.rate, l.p50, l.p99 = rate, ms(find(wrkP50)), ms(find(wrkP99))
	return l, errors.Join(err, e)
}

func measureHTTP(opt *options, t *Table) error {
	rounds, seconds := 3, 3
	if opt.quick {
		rounds, seconds = 1, 1
	}
	t.About = fmt.Sprintf("net/http answers 13 bytes to wrk's 32 connections (one thread, on the same machine): medians of %d rounds of %d s. "+
		"Without keep-alive each request is a connection; with it nothing is accepted after the first moment, so differences are noise. No bar: on few cores client and server compete.", rounds, seconds)
	t.Key, t.Columns = "listeners", []string{"keep-alive: requests/s", "p50 ms", "p99 ms", "a connection each: requests/s", "p50 ms", "p99 ms"}
	path, err := exec.LookPath("wrk")
	if err != nil {
		t.Skipped = "wrk isn't installed (Debian: apt-get install wrk)"
		return nil
	}
	type server struct {
		title, name string
		n           int
		p           *process
		got         [2][3][]float64 // keep-alive or not; rate, p50, p99
	}
	var servers []*server
	for _, s := range []*server{
		{title: "net.Listen", name: nameNet, n: 1},
		{title: "go-reuseport x4", name: nameGoReuse, n: 4},
		{title: "fasthttp/reuseport x4", name: nameFasthttp, n: 4},
		{title: "lblisten x4", name: nameLB, n: 4},
		{title: "lblisten x4, dispatcher", name: nameDispatcher, n: 4},
	} {
		p, err := start("http", s.name, strconv.Itoa(s.n))
		if err != nil {
			return named(s.title, err)
		}
		defer p.stop()
		s.p = p
		servers = append(servers, s)
	}
	for range rounds {
		for _, i := range rand.Perm(2 * len(servers)) {
			s, mode := servers[i/2], i%2
			l, err := wrk(path, s.p.hello, seconds, mode == 0)
			if err != nil {
				return named(s.title, err)
			}
			if l.trouble != "" {
				t.Notes = append(t.Notes, s.title+", one round: "+l.trouble)
			}
			for j, v := range []float64{l.rate, l.p50, l.p99} {
				s.got[mode][j] = append(s.got[mode][j], v)
			}
		}
	}
	for _, s := range servers {
		var cells []cell
		for mode := range s.got {
			for j, format := range []string{"%.0f", "%.2f", "%.2f"} {
				cells = append(cells, num(format, median(s.got[mode][j])))
			}
		}
		t.row(s.title, cells...)
	}
	return nil
}
