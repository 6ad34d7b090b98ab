package main

// The clients: each sends one request after the other until it is told to stop.
// The odd ones open a connection for each request, the even ones keep theirs.

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"time"
)

// patience is how long a client waits for an answer. A lost connection shows at
// once, as a reset; this is for one that nobody ever takes.
const patience = 10 * time.Second

// load is all clients.
type load struct {
	url  string
	stop chan struct{}
	all  sync.WaitGroup

	mu       sync.Mutex // guards what follows
	requests int
	failures int
	died     int // failed, because the server that had accepted the connection was killed
	repeated int // by http.Client, because the connection it had kept was gone
	first    error
	answered time.Time       // when the last answer came
	longest  time.Duration   // without one, since the first
	pids     map[string]bool // of the servers that answered
	doomed   map[int]bool    // ports of the clients whose connections a killed server had accepted
}

// startLoad lets n clients loose on addr.
func startLoad(addr string, n int) *load {
	l := &load{url: "http://" + addr, stop: make(chan struct{}), pids: make(map[string]bool), doomed: make(map[int]bool)}
	for i := range n {
		l.all.Add(1)
		go l.client(i%2 == 0)
	}
	return l
}

// end lets every client finish its request.
func (l *load) end() {
	close(l.stop)
	l.all.Wait()
}

func (l *load) client(keepAlive bool) {
	defer l.all.Done()
	// A transport of its own: its connections are this client's alone.
	tr := &http.Transport{DisableKeepAlives: !keepAlive}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: patience}
	for {
		select {
		case <-l.stop:
			return
		default:
			l.request(client)
		}
	}
}

// request sends one request and counts what becomes of it.
func (l *load) request(client *http.Client) {
	tries, port := 0, 0 // port of the last connection
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			tries++
			port = info.Conn.LocalAddr().(*net.TCPAddr).Port
			if !info.Reused {
				l.reuse(port)
			}
		},
	})
	pid, err := get(ctx, client, l.url)

	l.mu.Lock()
	l.requests++
	l.repeated += max(tries-1, 0)
	switch {
	case err == nil:
		l.pids[pid] = true
		now := time.Now()
		if !l.answered.IsZero() {
			l.longest = max(l.longest, now.Sub(l.answered))
		}
		l.answered = now
	case l.doomed[port]:
		delete(l.doomed, port)
		l.died++
	default:
		if l.failures++; l.failures == 1 {
			l.first = err
		}
	}
	l.mu.Unlock()
	if err != nil {
		time.Sleep(10 * time.Millisecond) // so as not to spin while nobody listens
	}
}

func get(ctx context.Context, client *http.Client, url string) (body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return "", err
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("the answer is %s", resp.Status)
	}
	return strings.TrimSpace(string(b)), nil
}

// doom notes the connections that a server had accepted which is about to be
// killed, by the ports of their clients. It must not be called after the kill:
// a client may be reset, and count, at once.
func (l *load) doom(ports []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, port := range ports {
		l.doomed[port] = true
	}
}

// reuse notes that a port belongs to a new connection, so the one that was
// doomed is gone.
func (l *load) reuse(port int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.doomed, port)
}
