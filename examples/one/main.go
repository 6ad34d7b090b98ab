// One is the smallest real service of one process: an HTTP server that is stopped and then
// started, crashes or is killed, and loses no queued connection. Under systemd its store
// of file descriptors keeps the sockets (one.service, or one.socket as the other way);
// elsewhere a keeper does (-handoff, and lbkeep: see the other files here).
//
//	go run ./examples/one
//	curl http://127.0.0.1:8080
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`address` to listen on")
	handoff := flag.String("handoff", "", "`directory` of the handoff that a keeper keeps; default: systemd keeps the sockets")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	keeps := lblisten.WithSystemd()
	if *handoff != "" {
		keeps = lblisten.WithHandoff(*handoff)
	}
	// Everything else that may fail comes before this: from here on clients wait for
	// this process.
	g, err := lblisten.ListenGroup(ctx, "tcp", *addr, runtime.GOMAXPROCS(0), keeps)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("ready on %v: %v\n", g.Addr(), g.Info())
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello from process", os.Getpid())
	})}
	if err := lbhttp.Serve(ctx, g, srv, 10*time.Second); err != nil {
		log.Fatal(err)
	}
}
