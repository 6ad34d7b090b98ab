// Haproxy is an HTTP server behind HAProxy, with the client's address by the PROXY
// protocol. Start several on one address and path on each host, and any of them can
// go, killed or restarted, while HAProxy sees one server that never refuses.
// haproxy.cfg is the configuration.
//
//	go run ./haproxy -addr 127.0.0.1:9001 -handoff /run/user/$UID/lblisten-1
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
	"github.com/pires/go-proxyproto"
)

// grace is how long a stopping server waits for its connections.
const grace = 15 * time.Second

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

	ln, err := lblisten.ListenContext(ctx, "tcp", addr, opt)
	if err != nil {
		return err
	}
	g, err := lblisten.Dispatch(behindProxy(ln), n)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(2 * time.Millisecond) // work
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "process %d answers %s\n", os.Getpid(), host)
		}),
		ReadHeaderTimeout: 5 * time.Second,
	}
	fmt.Println("ready on", g.Addr())
	return lbhttp.Serve(ctx, g, srv, grace)
}

// behindProxy takes the client's address from the PROXY header, and a connection
// without one for an error. Whoever can connect can claim any address: let nobody
// but the proxy do so.
func behindProxy(ln net.Listener) net.Listener {
	return listener{&proxyproto.Listener{
		Listener:          ln,
		Policy:            func(net.Addr) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil },
		ReadHeaderTimeout: 5 * time.Second,
	}}
}

// A listener has the SetDeadline that go-proxyproto's lacks: with it Dispatch can interrupt
// an Accept, and need not close a connection that comes at the end.
type listener struct{ *proxyproto.Listener }

func (l listener) SetDeadline(t time.Time) error {
	return l.Listener.Listener.(*lblisten.Listener).SetDeadline(t)
}
