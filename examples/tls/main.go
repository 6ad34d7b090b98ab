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
	"errors"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
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

	var stopping atomic.Bool
	waiting := &connections{open: make(map[net.Conn]bool)}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if stopping.Load() {
				w.Header().Set("Connection", "close") // in HTTP/2 the client gets a GOAWAY
			}
			time.Sleep(5 * time.Millisecond) // work
			fmt.Fprintln(w, r.Proto, "by process", os.Getpid())
		}),
		TLSConfig:         config,
		ConnState:         waiting.note,
		ReadHeaderTimeout: 5 * time.Second,
	}
	served := make(chan error, 1)
	go func() {
		served <- g.Serve(func(ln net.Listener) error { return srv.ServeTLS(ln, "", "") })
	}()
	fmt.Printf("ready on https://%v\n", g.Addr())

	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // a second signal ends the program at once

	// First the listeners: another process takes over what is queued, and what comes.
	// Then what has been accepted, then the server. Shutdown alone would close
	// connections that have come and not said anything yet.
	g.Close()
	<-served // no Accept returns any more
	stopping.Store(true)
	time.Sleep(leaveTime)
	waiting.end(answerTime)
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("shutting down: %w", err), srv.Close())
	}
	return nil
}

// newConfig has the certificate, and the keys of session tickets. ServeTLS copies
// the configuration for each listener, and without keys each copy would make its
// own: a client that comes back, to another accept loop, could not resume its
// session. (For it to resume in another process too, give all of them the same
// keys, and new ones every day.)
func newConfig(certFile, keyFile string) (*tls.Config, error) {
	var cert tls.Certificate
	var err error
	if certFile != "" || keyFile != "" {
		cert, err = tls.LoadX509KeyPair(certFile, keyFile)
	} else {
		cert, err = newCertificate()
	}
	if err != nil {
		return nil, err
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	var ticketKey [32]byte
	if _, err := rand.Read(ticketKey[:]); err != nil {
		return nil, err
	}
	config.SetSessionTicketKeys([][32]byte{ticketKey})
	return config, nil
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

// connections are those that wait for an answer.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]bool // guarded by mu
}

// note is for http.Server.ConnState.
func (cs *connections) note(c net.Conn, state http.ConnState) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive:
		cs.open[c] = true
	default: // idle, closed or hijacked
		delete(cs.open, c)
	}
}

// end waits until there are none, for the time at most.
func (cs *connections) end(most time.Duration) {
	for deadline := time.Now().Add(most); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		cs.mu.Lock()
		n := len(cs.open)
		cs.mu.Unlock()
		if n == 0 {
			return
		}
	}
}
