// Haproxy is an HTTP server behind HAProxy, with the client's address by the PROXY
// protocol. Start several on one address and path on each host, and any of them can
// go, killed or restarted, while HAProxy sees one server that never refuses.
// haproxy.cfg is the configuration.
//
//	go run ./haproxy -addr 127.0.0.1:9001 -handoff /run/user/$UID/lblisten-1
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/pires/go-proxyproto"
)

// leaveTime is how long clients that are busy on a connection have to hear that it
// ends, answerTime how long a stopping server then waits for its open connections,
// and shutdownTime how long for its idle ones.
const (
	leaveTime    = 250 * time.Millisecond
	answerTime   = 10 * time.Second
	shutdownTime = 5 * time.Second
)

func main() {
	addr := flag.String("addr", "127.0.0.1:9001", "`address` to listen on")
	n := flag.Int("n", 4, "number of accept loops")
	handoff := flag.String("handoff", "", "`directory` of the handoff, the same in all processes of the address; default: none")
	flag.Parse()
	opt := lblisten.WithLB()
	if *handoff != "" {
		opt = lblisten.WithHandoff(*handoff)
	}
	if err := serve(*addr, *n, opt); err != nil {
		fmt.Fprintln(os.Stderr, "haproxy:", err)
		os.Exit(1)
	}
}

func serve(addr string, n int, opt lblisten.Option) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	g, err := lblisten.ListenGroup(ctx, "tcp", addr, n, opt)
	if err != nil {
		return err
	}
	var stopping atomic.Bool
	var waiting sync.Map // connections that have not been answered
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if stopping.Load() {
				w.Header().Set("Connection", "close")
			}
			time.Sleep(2 * time.Millisecond) // work
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "process %d answers %s\n", os.Getpid(), host)
		}),
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew, http.StateActive:
				waiting.Store(c, true)
			default: // idle, closed or hijacked
				waiting.Delete(c)
			}
		},
		ReadHeaderTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() {
		served <- g.Serve(func(ln net.Listener) error { return srv.Serve(behindProxy(ln)) })
	}()
	fmt.Println("ready on", g.Addr())

	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program at once

	// First the listeners: another process takes over what is queued, and what comes.
	// Then what has been accepted, then the server. HAProxy's connections are kept
	// open, and it repeats a request on one that turns out to be closed.
	g.Close()
	<-served // no Accept returns any more
	stopping.Store(true)
	time.Sleep(leaveTime)
	for deadline := time.Now().Add(answerTime); time.Now().Before(deadline) && !isEmpty(&waiting); {
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("shutting down: %w", err), srv.Close())
	}
	return nil
}

// behindProxy takes the client's address from the PROXY header, and a connection
// without one for an error. Whoever can connect can claim any address: let nobody
// but the proxy do so.
func behindProxy(ln net.Listener) net.Listener {
	return &proxyproto.Listener{
		Listener:          ln,
		Policy:            func(net.Addr) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil },
		ReadHeaderTimeout: 5 * time.Second,
	}
}

func isEmpty(m *sync.Map) bool {
	empty := true
	m.Range(func(any, any) bool {
		empty = false
		return false
	})
	return empty
}
