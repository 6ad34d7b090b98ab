package lbhttp_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

// A server with four accept loops, which SIGTERM ends.
func ExampleServe() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	g, err := lblisten.ListenGroup(ctx, "tcp", "127.0.0.1:0", 4)
	if err != nil {
		fmt.Println(err)
		return
	}
	time.AfterFunc(10*time.Millisecond, stop) // here nobody sends it
	srv := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: 5 * time.Second}
	fmt.Println(lbhttp.Serve(ctx, g, srv, 10*time.Second))
	// Output: <nil>
}

func ExampleServeTLS() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	g, err := lblisten.ListenGroup(ctx, "tcp", "127.0.0.1:0", 1)
	if err != nil {
		fmt.Println(err)
		return
	}
	srv := &http.Server{TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13}}
	if err := lbhttp.ServeTLS(ctx, g, srv, "cert.pem", "key.pem", 10*time.Second); err != nil {
		fmt.Println(err)
	}
	// Output: open cert.pem: no such file or directory
}
