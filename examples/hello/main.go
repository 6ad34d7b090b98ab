// Hello is an HTTP server with several listeners on one port. Each answer says
// which listener and which process it came from. Where the kernel balances it
// can be started several times on the same address.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
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
		fmt.Fprintln(os.Stderr, "hello:", err)
		os.Exit(1)
	}
}

// indexKey is the context key of the listener's index.
type indexKey struct{}

func serve(addr string, n int) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	g, err := lblisten.ListenGroup(ctx, "tcp", addr, n)
	if err != nil {
		return err
	}
	info, listeners := g.Info(), g.Listeners()
	fmt.Printf("http://%v: %d listeners, balanced by %v; who takes over when one closes: %v\n",
		g.Addr(), info.Members, info.Balancer, info.OnClose)
	if info.Reason != nil {
		fmt.Println("nothing stronger because", info.Reason)
	}

	srv := &http.Server{
		// A connection doesn't know its listener, but the server asks for a
		// context for each listener that it serves.
		BaseContext: func(ln net.Listener) context.Context {
			i := slices.IndexFunc(listeners, func(l *lblisten.Listener) bool { return l == ln })
			return context.WithValue(context.Background(), indexKey{}, i)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "hello from listener %d of process %d\n", r.Context().Value(indexKey{}), os.Getpid())
		}),
		ReadHeaderTimeout: 10 * time.Second,
	}
	return lbhttp.Serve(ctx, g, srv, 5*time.Second)
}
