package test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
)

// testTLS is a server's configuration, with a certificate that nobody verifies.
func testTLS(t testing.TB) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:   []string{"h2", "http/1.1"},
	}
}

// http2TLS is a transport for HTTP/2 over TLS.
func (g *group) http2TLS() http.RoundTripper {
	return &http.Transport{
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		ForceAttemptHTTP2: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return g.dial(ctx) },
	}
}

// http2Clear is a transport for HTTP/2 without TLS.
func (g *group) http2Clear() http.RoundTripper {
	return &http2.Transport{
		AllowHTTP:      true,
		DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) { return g.dial(ctx) },
	}
}

// testHTTP2 closes members under load until one is left.
func testHTTP2(t *testing.T, g *group, srv *httpServer, serve func(net.Listener) error, transport func() http.RoundTripper, scheme string) {
	served := g.start(serve)
	clients := newHTTPClients(t, 4, transport)
	l := startLoad(t, 4, func() error { return clients.get(scheme+g.addr(), 2) })
	g.leave(t, l, count(60, 20))
	l.end(t, g)
	require.Equal(t, l.answered.Load(), srv.handled.Load())
	clients.closeIdle()
	srv.shutdown(t, served)
}

// HTTP/2 as net/http has it: by ServeTLS, by tls.NewListener around a member,
// and without TLS.
func TestHTTP2(t *testing.T) {
	t.Run("ServeTLS", func(t *testing.T) {
		inRows(t, func(t *testing.T, g *group) {
			srv := newHTTPServer()
			srv.TLSConfig = testTLS(t)
			testHTTP2(t, g, srv, func(l net.Listener) error { return srv.ServeTLS(l, "", "") }, g.http2TLS, "https://")
		})
	})
	t.Run("tls.NewListener", func(t *testing.T) {
		inRows(t, func(t *testing.T, g *group) {
			srv, config := newHTTPServer(), testTLS(t)
			testHTTP2(t, g, srv, func(l net.Listener) error { return srv.Serve(tls.NewListener(l, config)) }, g.http2TLS, "https://")
		})
	})
	t.Run("without TLS", func(t *testing.T) {
		inRows(t, func(t *testing.T, g *group) {
			srv := newHTTPServer()
			srv.Handler = h2c.NewHandler(srv.Handler, new(http2.Server))
			testHTTP2(t, g, srv, srv.Serve, g.http2Clear, "http://")
		})
	})
	t.Run("Dispatch around tls.NewListener", func(t *testing.T) {
		noLeaks(t)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		g, err := dispatch(tls.NewListener(ln, testTLS(t)))
		require.NoError(t, err)
		t.Cleanup(func() { g.close() })
		srv := newHTTPServer()
		testHTTP2(t, g, srv, srv.Serve, g.http2TLS, "https://")
	})
}
