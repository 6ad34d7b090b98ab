// Metrics is an HTTP server whose group of listeners can be watched at
// /debug/vars, with nothing but the standard library. The module prometheus has a
// collector for Prometheus.
package main

import (
	"context"
	"expvar"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`address` to listen on")
	n := flag.Int("n", 4, "number of listeners")
	flag.Parse()
	if err := serve(*addr, *n); err != nil {
		fmt.Fprintln(os.Stderr, "metrics:", err)
		os.Exit(1)
	}
}

// vars is what a group says, in a form that JSON shows: of its own it would print
// an Inheritance as a number and an error as {}.
type vars struct {
	Address                             string
	Balancer, Steering, OnClose, OnKill string
	Reason                              string `json:",omitempty"`
	Members, Sockets                    int
	lblisten.Stats                      // of the group
	Listeners                           []lblisten.Stats
}

func read(g *lblisten.Group) vars {
	info := g.Info()
	v := vars{
		Address:  g.Addr().String(),
		Balancer: info.Balancer.String(), Steering: info.Steering.String(),
		OnClose: info.OnClose.String(), OnKill: info.OnKill.String(),
		Members: info.Members, Sockets: info.Sockets,
		Stats: g.Stats(),
	}
	if info.Reason != nil {
		v.Reason = info.Reason.Error()
	}
	for _, l := range g.Listeners() {
		v.Listeners = append(v.Listeners, l.Stats())
	}
	return v
}

func serve(addr string, n int) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	g, err := lblisten.ListenGroup(ctx, "tcp", addr, n)
	if err != nil {
		return err
	}
	// expvar has put its handler on http.DefaultServeMux, and with ours it tells the
	// command line and the memory: don't serve that mux to strangers.
	expvar.Publish("lblisten", expvar.Func(func() any { return read(g) }))
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second}
	fmt.Printf("http://%v/debug/vars\n", g.Addr())
	return lbhttp.Serve(ctx, g, srv, 5*time.Second)
}
