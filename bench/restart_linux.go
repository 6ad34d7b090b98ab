package main

// Restarts of a service of one process under load: it is stopped, and then started.

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/internal/standin"
	"github.com/lblisten/lblisten/lbhttp"
)

// The ways in which a service is restarted.
const (
	wayNet     = "net.Listen, Shutdown"
	wayNobody  = "lbhttp, nobody takes over"
	wayKeeper  = "lbhttp, a keeper"
	waySystemd = "lbhttp, systemd (a stand-in)"
)

// serveWeb is an HTTP server, until its stdin ends. Its arguments are the way, the handoff
// and the address.
func serveWeb(p *childSide) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello\n") })}
	if p.args[0] == wayNet {
		ln, err := net.Listen("tcp", p.args[2])
		if err != nil {
			return err
		}
		p.say(ln.Addr().String())
		go srv.Serve(ln)
		p.awaitEnd()
		return srv.Shutdown(ctx)
	}
	opts := map[string][]lblisten.Option{
		wayKeeper:  {lblisten.WithHandoff(p.args[1])},
		waySystemd: {lblisten.WithSystemd()},
	}[p.args[0]]
	g, err := lblisten.ListenGroup(ctx, "tcp", p.args[2], 1, opts...)
	if err != nil {
		return err
	}
	p.say(g.Addr().String())
	go func() {
		p.awaitEnd()
		stop()
	}()
	return lbhttp.Serve(ctx, g, srv, 20*time.Second)
}

func measureRestart(opt *options, t *Table) error {
	restarts := 20
	if opt.quick {
		restarts = 3
	}
	t.About = fmt.Sprintf("%d restarts of an HTTP server of one process, which is stopped and then started, under 16 clients of which each keeps its connection and does one request after the other. A start is from exec to the end of Listen, without load.", restarts)
	t.Key, t.Columns = "way", []string{"requests", "failed", "longest, ms", "a start, ms"}
	for _, way := range []string{wayNet, wayNobody, wayKeeper, waySystemd} {
		if err := restart(way, restarts, t); err != nil {
			return named(way, err)
		}
	}
	return nil
}

func restart(way string, restarts int, t *Table) error {
	dir, err := os.MkdirTemp("", "lblisten-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, begin := filepath.Join(dir, "handoff"), (*exec.Cmd).Start
	switch way {
	case wayKeeper:
		k, err := start("keeper", path)
		if err != nil {
			return err
		}
		defer k.stop()
	case waySystemd:
		s, err := standin.New(dir, 8)
		if err != nil {
			return err
		}
		defer s.Close()
		begin = s.Start
	}
	addr := anyPort
	var starts []float64
	for range 5 { // the last one goes on, at its address
		began := time.Now()
		p, err := startBy((*exec.Cmd).Start, nil, "web", wayNobody, path, anyPort)
		if err != nil {
			return err
		}
		starts = append(starts, ms(time.Since(began)))
		addr = p.hello
		p.stop()
	}
	slices.Sort(starts)
	p, err := startBy(begin, nil, "web", way, path, addr)
	if err != nil {
		return err
	}
	defer func() { p.stop() }()
	l := startWebLoad(addr, 16)
	for range restarts {
		time.Sleep(50 * time.Millisecond)
		p.stop()
		if p, err = startBy(begin, nil, "web", way, path, addr); err != nil {
			l.end()
			return err
		}
	}
	time.Sleep(50 * time.Millisecond)
	l.end()
	row := t.row(way, num("%.0f", float64(l.requests)), num("%.0f", float64(l.failed)), num("%.0f", ms(l.longest)), num("%.0f", starts[len(starts)/2]))
	if way == wayKeeper || way == waySystemd {
		row.exactly("failed", float64(l.failed), 0)
		row.atMost("longest, ms, beyond a start", ms(l.longest)-starts[len(starts)/2], 50)
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// webLoad is clients that do one request after the other.
type webLoad struct {
	stop chan struct{}
	wg   sync.WaitGroup

	mu               sync.Mutex // guards what follows
	requests, failed int
	longest          time.Duration
}

func startWebLoad(addr string, clients int) *webLoad {
	l := &webLoad{stop: make(chan struct{})}
	for range clients {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			tr := new(http.Transport)
			defer tr.CloseIdleConnections()
			c := &http.Client{Transport: tr, Timeout: 10 * time.Second}
			for {
				select {
				case <-l.stop:
					return
				case <-time.After(2 * time.Millisecond):
				}
				began := time.Now()
				resp, err := c.Post("http://"+addr, "text/plain", nil) // a GET would be repeated by the client
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				l.mu.Lock()
				l.requests++
				l.longest = max(l.longest, time.Since(began))
				if err != nil {
					l.failed++
				}
				l.mu.Unlock()
			}
		}()
	}
	return l
}

func (l *webLoad) end() {
	close(l.stop)
	l.wg.Wait()
}
