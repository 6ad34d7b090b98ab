// Package lbhttp serves an [http.Server] on a group of package lblisten, and stops it without
// failing a request that ends in time.
//
//	func main() {
//		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
//		defer stop()
//		g, err := lblisten.ListenGroup(ctx, "tcp", ":8080", 1, lblisten.WithSystemd())
//		if err != nil {
//			log.Fatal(err)
//		}
//		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })
//		if err := lbhttp.Serve(ctx, g, new(http.Server), 10*time.Second); err != nil {
//			log.Fatal(err)
//		}
//	}
//
// [http.Server.Shutdown] alone fails requests: it closes connections that have been accepted
// and have said nothing yet, and those whose client is about to send the next request.
package lbhttp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"math"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/internal/sdnotify"
)

const (
	// idleTime is how long a connection must have been idle to be closed. A client that
	// is busy on it sends its next request sooner, and is answered with "Connection:
	// close"; a POST that meets a closing connection is not tried again. It is longTime
	// where nobody waits for this process to end, because others accept.
	idleTime = 250 * time.Millisecond
	longTime = time.Second

	// queueTime is the longest time for which the queue is emptied, if nobody takes it
	// over; and a quarter of the grace.
	queueTime = 5 * time.Second

	// blindTime is that time where the system doesn't tell the length of the queue.
	blindTime = 100 * time.Millisecond

	// newTime is how long a connection that says nothing is waited for, from its accept
	// on, as by Shutdown: clients open some that they may never use.
	newTime = 5 * time.Second

	// goAwayTime is how long the client of an idle HTTP/2 connection has to close it when
	// it is told to; or else the server does. Shutdown alone waits for a second.
	goAwayTime = 100 * time.Millisecond

	// lookTime is between two looks at the connections, while they change.
	lookTime = 5 * time.Millisecond
)

// Serve serves srv on all members of the group until ctx ends, and then stops it:
//
//   - If somebody takes over the queue (Info.OnClose of the group: another process, a
//     keeper, systemd, other members of the address), the group is closed at once. If
//     nobody does, it accepts until the queue is empty, for at most 5 s and, if grace isn't 0,
//     at most a quarter of it, and is closed then.
//   - From then on each answer tells its client that the connection ends: by "Connection:
//     close" in HTTP/1, a GOAWAY in HTTP/2.
//   - It waits until all requests are answered. A new connection has 5 s from its accept,
//     TLS handshake included, to send its first. Connections that are left are closed when
//     they have been idle for a second; for 250 ms if new clients have to wait, because
//     only systemd takes over, or nobody.
//   - Then it calls srv.Shutdown. Have endless answers (server-sent events) watch ctx:
//     functions of srv.RegisterOnShutdown run only now.
//
// All of that takes grace at the most; requests that aren't answered then are cut off, and
// the error wraps [context.DeadlineExceeded]. A grace of 0 is no limit, a negative one no
// wait. After an orderly end Serve returns nil. If serving ends before ctx does, the group
// is closed, and the error is that of srv.Serve: [http.ErrServerClosed] after a Shutdown by
// somebody else. As with Shutdown, hijacked connections are left to whoever has them.
//
// Under systemd it says READY=1 when srv begins to serve, and STOPPING=1 when ctx ends, as
// Type=notify expects.
//
// srv.Handler, srv.ConnState and srv.BaseContext are wrapped. A server can be served on one
// group at a time.
func Serve(ctx context.Context, g *lblisten.Group, srv *http.Server, grace time.Duration) error {
	return serve(ctx, g, srv, grace, srv.Serve)
}

// ServeTLS is Serve with TLS, as [http.Server.ServeTLS] has it: the files may be empty if
// srv.TLSConfig has a certificate. The members share their session tickets' keys, so that a
// client can resume its session at any of them.
func ServeTLS(ctx context.Context, g *lblisten.Group, srv *http.Server, certFile, keyFile string, grace time.Duration) error {
	shareTickets(srv)
	return serve(ctx, g, srv, grace, func(ln net.Listener) error { return srv.ServeTLS(ln, certFile, keyFile) })
}

// shareTickets has all copies of the server's TLS configuration, of which ServeTLS makes
// one for each listener, use the keys of one.
func shareTickets(srv *http.Server) {
	keys := srv.TLSConfig
	if keys == nil {
		keys = new(tls.Config)
	}
	if keys.WrapSession != nil || keys.UnwrapSession != nil {
		return
	}
	srv.TLSConfig = keys.Clone()
	srv.TLSConfig.WrapSession = keys.EncryptTicket
	srv.TLSConfig.UnwrapSession = keys.DecryptTicket
}

func serve(ctx context.Context, g *lblisten.Group, srv *http.Server, grace time.Duration, serveOn func(net.Listener) error) error {
	s := &stopper{conns: make(map[net.Conn]conn), changed: make(chan struct{}, 1)}
	s.wrap(srv)
	served := make(chan error, 1)
	go func() { served <- g.Serve(serveOn) }()
	select {
	case err := <-served:
		g.Close()
		return err
	case <-ctx.Done():
	}
	tell(srv, "STOPPING=1")
	late := context.Background()
	if grace != 0 {
		var stop context.CancelFunc
		late, stop = context.WithTimeout(late, max(grace, 0))
		defer stop()
	}
	idle := idleTime
	switch heirs := heirsOf(g); {
	case heirs == 0:
		empty(late, g, grace)
	case heirs != lblisten.InheritSystemd:
		idle = longTime
	}
	g.Close()
	s.stopping.Store(true)
	<-served // ConnState has seen all that was accepted
	s.wait(late, idle)
	if left := s.end(late, srv); left > 0 {
		return fmt.Errorf("lbhttp: %d connections were closed whose requests weren't answered within the grace of %v: %w", left, grace, context.DeadlineExceeded)
	}
	return nil
}

// tell says something to systemd, if there is one.
func tell(srv *http.Server, what string) {
	err := sdnotify.Send(what)
	switch {
	case err == nil || errors.Is(err, sdnotify.ErrNoSocket):
	case srv.ErrorLog != nil:
		srv.ErrorLog.Printf("lbhttp: telling systemd %s: %v", what, err)
	default:
		log.Printf("lbhttp: telling systemd %s: %v", what, err)
	}
}

// heirsOf tells who takes over the queue when the group closes.
func heirsOf(g *lblisten.Group) lblisten.Inheritance {
	info := g.Info()
	if info.Members <= len(g.Listeners()) { // these don't inherit from each other
		return info.OnClose &^ lblisten.InheritProcess
	}
	return info.OnClose
}

// empty returns when nothing is queued, or it is time.
func empty(late context.Context, g *lblisten.Group, grace time.Duration) {
	most := queueTime
	if grace != 0 {
		most = min(most, max(grace, 0)/4)
	}
	queued := g.Stats().Queued
	if queued < 0 {
		most = min(most, blindTime)
	}
	ctx, stop := context.WithTimeout(late, most)
	defer stop()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for ; queued != 0; queued = g.Stats().Queued {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}

// A stopper knows the connections of a server.
type stopper struct {
	stopping atomic.Bool

	mu      sync.Mutex // guards conns
	conns   map[net.Conn]conn
	changed chan struct{} // has wait look; holds one
}

// A conn is what a connection does.
type conn struct {
	state http.ConnState // new, active or idle
	since time.Time
}

// wrap has the server tell what its connections do, and tell clients that they end.
func (s *stopper) wrap(srv *http.Server) {
	connState := srv.ConnState
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		s.note(c, state)
		if connState != nil {
			connState(c, state)
		}
	}
	base := srv.BaseContext
	if base == nil {
		base = func(net.Listener) context.Context { return context.Background() }
	}
	var ready sync.Once
	srv.BaseContext = func(ln net.Listener) context.Context { // Serve calls it, when it has the certificate
		ready.Do(func() { tell(srv, "READY=1") })
		return base(ln)
	}
	handler := srv.Handler
	if handler == nil {
		handler = http.DefaultServeMux
	}
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.stopping.Load() {
			serveLast(handler, w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

func (s *stopper) note(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	switch state {
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, c)
	default:
		s.conns[c] = conn{state, time.Now()}
	}
	s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// wait returns when no request is to be expected any more, as all connections have been
// idle for a while, or it is late.
func (s *stopper) wait(late context.Context, idle time.Duration) {
	for {
		busy, next := s.look(idle)
		if busy == 0 {
			return
		}
		select {
		case <-s.changed:
			time.Sleep(lookTime) // one look for all that changes meanwhile
		case <-time.After(next):
		case <-late.Done():
			return
		}
	}
}

// end shuts the server down. It returns the number of connections that it has cut off.
func (s *stopper) end(late context.Context, srv *http.Server) (left int) {
	ctx, stop := context.WithCancel(late)
	defer stop()
	shut := make(chan error, 1)
	go func() { shut <- srv.Shutdown(ctx) }()
	select {
	case err := <-shut:
		if err == nil {
			return 0
		}
	case <-time.After(goAwayTime):
		s.wait(late, 0) // for a request that has crossed the GOAWAY
		stop()
		<-shut
	}
	left, _ = s.look(0)
	srv.Close()
	return left
}

// look tells how many connections a request is to be expected of, or its answer, and when
// that may change by itself.
func (s *stopper) look(idle time.Duration) (busy int, next time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next = time.Hour
	for _, c := range s.conns {
		left := time.Duration(math.MaxInt64)
		switch c.state {
		case http.StateIdle:
			left = idle - time.Since(c.since)
		case http.StateNew:
			left = newTime - time.Since(c.since)
		}
		if left > 0 {
			busy++
			next = min(next, left)
		}
	}
	return busy, next
}
