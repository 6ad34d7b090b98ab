// Tls is an HTTP/2 server with TLS and four accept loops on one port. It stops
// without failing a request.
//
//	go run ./examples/tls
//	curl -k https://127.0.0.1:8443
//
// The certificate is made in memory, unless -cert and -key name one. With -handoff
// several of these processes serve one address, and each can be restarted while
// another one runs.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/lbhttp"
)

// grace is how long a stopping server waits for its connections.
const grace = 15 * time.Second

func main() {
	addr := flag.String("addr", "127.0.0.1:8443", "`address` to listen on")
	n := flag.Int("n", 4, "number of accept loops")
	cert := flag.String("cert", "", "`file` of the certificate; default: one made in memory")
	key := flag.String("key", "", "`file` of its key")
	handoff := flag.String("handoff", "", "`directory` of the handoff, the same in all processes")
	flag.Parse()
	if err := serve(*addr, *n, *cert, *key, *handoff); err != nil {
		fmt.Fprintln(os.Stderr, "tls:", err)
		os.Exit(1)
	}
}

func serve(addr string, n int, certFile, keyFile, handoff string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	config, err := newConfig(certFile, keyFile)
	if err != nil {
		return err
	}
	opt := lblisten.WithLB()
	if handoff != "" {
		opt = lblisten.WithHandoff(handoff)
	}
	g, err := lblisten.ListenGroup(ctx, "tcp", addr, n, opt)
	if err != nil {
		return err
	}

	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(5 * time.Millisecond) // work
			fmt.Fprintln(w, r.Proto, "by process", os.Getpid())
		}),
		TLSConfig:         config,
		ReadHeaderTimeout: 5 * time.Second,
	}
	fmt.Printf("ready on https://%v\n", g.Addr())
	return lbhttp.ServeTLS(ctx, g, srv, "", "", grace)
}

// newConfig has the certificate. The accept loops share the keys of session tickets, which
// are made anew every day; for a client to resume its session in another process too, give
// all of them the same keys.
func newConfig(certFile, keyFile string) (*tls.Config, error) {
	var cert tls.Certificate
	var err error
	if certFile != "" || keyFile != "" {
		cert, err = tls.LoadX509KeyPair(certFile, keyFile)
	} else {
		cert, err = newCertificate()
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}}, err
}

// newCertificate makes one for this machine, which only a client that is told to
// trust it trusts.
func newCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(0, 1, 0),
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
