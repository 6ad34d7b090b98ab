package lblisten

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// testCertificate is good for 127.0.0.1, if nobody verifies it.
func testCertificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Replacing net.Listen is all that net/http needs: Serve, ServeTLS with HTTP/2,
// and Shutdown under load, which loses no request of a client that retries as
// http.Transport does.
func TestHTTP(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		for _, tlsOn := range []bool{false, true} {
			t.Run(map[bool]string{false: "Serve", true: "ServeTLS"}[tlsOn], func(t *testing.T) {
				g, _ := newTestGroup(t, 4, "tcp", "127.0.0.1:0", m.opt)
				var protocol atomic.Int64
				srv := &http.Server{
					TLSConfig: &tls.Config{Certificates: []tls.Certificate{testCertificate(t)}},
					Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						protocol.Store(int64(r.ProtoMajor))
						io.WriteString(w, "hello")
					}),
				}
				served := make(chan error, 1)
				go func() {
					if tlsOn {
						served <- g.Serve(func(l net.Listener) error { return srv.ServeTLS(l, "", "") })
					} else {
						served <- g.Serve(srv.Serve)
					}
				}()
				tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
				client := &http.Client{Transport: tr, Timeout: limit(10 * time.Second)}
				url := map[bool]string{false: "http://", true: "https://"}[tlsOn] + g.Addr().String()
				for i := range 40 {
					resp, err := client.Get(url)
					require.NoError(t, err)
					b, err := io.ReadAll(resp.Body)
					require.NoError(t, err)
					require.Equal(t, "hello", string(b))
					resp.Body.Close()
					if i%4 == 3 {
						tr.CloseIdleConnections()
					}
				}
				require.EqualValues(t, map[bool]int{false: 1, true: 2}[tlsOn], protocol.Load())
				tr.CloseIdleConnections()
				ctx, cancel := context.WithTimeout(context.Background(), limit(10*time.Second))
				defer cancel()
				require.NoError(t, srv.Shutdown(ctx))
				require.ErrorIs(t, <-served, http.ErrServerClosed)
			})
		}
	})
}

// Two servers on one address; one shuts down under load, and no request fails.
// Its listeners close first and its connections are waited for: Shutdown itself
// closes a connection whose first request it has not read yet.
func TestShutdownUnderLoad(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		a, _ := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		b, err := ListenGroup(context.Background(), "tcp", a.Addr().String(), 2, m.opt)
		require.NoError(t, err)
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
		var open atomic.Int64 // connections of one
		one, two := &http.Server{Handler: handler}, &http.Server{Handler: handler}
		one.ConnState = func(_ net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				open.Add(1)
			case http.StateClosed:
				open.Add(-1)
			}
		}
		served := map[*http.Server]chan struct{}{one: make(chan struct{}), two: make(chan struct{})}
		for srv, g := range map[*http.Server]*Group{one: a, two: b} {
			go func() {
				defer close(served[srv])
				err := g.Serve(srv.Serve)
				if !errors.Is(err, http.ErrServerClosed) && (srv == two || !errors.Is(err, net.ErrClosed)) {
					t.Errorf("Serve returned %v", err)
				}
			}()
		}
		// Every request has a connection of its own.
		tr := &http.Transport{DisableKeepAlives: true}
		client := &http.Client{Transport: tr, Timeout: limit(10 * time.Second)}
		var ok, failed atomic.Int64
		var stop atomic.Bool
		var clients sync.WaitGroup
		for range 8 {
			clients.Add(1)
			go func() {
				defer clients.Done()
				for !stop.Load() && ok.Load() < 5000 { // every one leaves a port in TIME_WAIT
					resp, err := client.Get("http://" + a.Addr().String())
					if err != nil {
						t.Log(err)
						failed.Add(1)
						continue
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					ok.Add(1)
				}
			}()
		}
		reach := func(n int64) {
			require.Eventually(t, func() bool { return ok.Load() >= n }, limit(20*time.Second), time.Millisecond)
		}
		reach(int64(count(300, 30)))
		ctx, cancel := context.WithTimeout(context.Background(), limit(20*time.Second))
		defer cancel()
		require.NoError(t, a.Close())
		<-served[one] // so that ConnState knows all that was accepted
		require.Eventually(t, func() bool { return open.Load() == 0 }, limit(20*time.Second), time.Millisecond)
		require.NoError(t, one.Shutdown(ctx))
		reach(ok.Load() + int64(count(300, 30)))
		stop.Store(true)
		clients.Wait()
		require.NoError(t, two.Shutdown(ctx))
		<-served[two]
		t.Logf("%d tried, %d lost", ok.Load()+failed.Load(), failed.Load())
		require.Zero(t, failed.Load())
	})
}

// x/net's HTTP/2 server, on connections accepted by hand.
func TestHTTP2(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", m.opt)
		srv := new(http2.Server)
		var wg sync.WaitGroup
		for i, l := range ls {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					wg.Add(1)
					go func() {
						defer wg.Done()
						srv.ServeConn(c, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							io.WriteString(w, strconv.Itoa(i))
						})})
					}()
				}
			}()
		}
		for range 10 {
			tr := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, addr)
			}}
			resp, err := (&http.Client{Transport: tr}).Get("http://" + g.Addr().String())
			require.NoError(t, err)
			require.Equal(t, 2, resp.ProtoMajor)
			resp.Body.Close()
			tr.CloseIdleConnections()
		}
		require.NoError(t, g.Close())
		wg.Wait()
	})
}
