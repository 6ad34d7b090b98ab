package lbhttp

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// slow is how many times slower than a usual machine this one is.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	return max(1, map[bool]float64{true: f}[err == nil])
}()

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// count is n on a usual machine, less on a slow one, with -short and with the race detector.
func count(n, least int) int {
	if testing.Short() || raceDetector {
		n /= 6
	}
	return max(least, int(float64(n)/slow))
}

func TestMain(m *testing.M) {
	if work := os.Getenv("LBHTTP_TEST_WORKER"); work != "" {
		worker(work)
		return
	}
	flag.Parse()
	asked := false
	flag.Visit(func(f *flag.Flag) { asked = asked || f.Name == "test.parallel" })
	if !asked {
		flag.Set("test.parallel", "12") // they wait, and need no processor each
	}
	goleak.VerifyTestMain(m)
}

var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

// A running server is stopped by stop, which returns what Serve does.
type running struct {
	g    *lblisten.Group
	addr string
	stop func() error
}

// start serves on an address, of which it has two members.
func start(t testing.TB, addr string, srv *http.Server, grace time.Duration, opts ...lblisten.Option) *running {
	t.Helper()
	g, err := lblisten.ListenGroup(context.Background(), "tcp", addr, 2, opts...)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		if srv.TLSConfig != nil {
			ended <- ServeTLS(ctx, g, srv, "", "", grace)
		} else {
			ended <- Serve(ctx, g, srv, grace)
		}
	}()
	stop := sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(limit(20 * time.Second)):
			panic("Serve doesn't return")
		}
	})
	t.Cleanup(func() { stop() })
	return &running{g, g.Addr().String(), stop}
}

// heir has others take over the queue of an address, and answer.
func heir(t testing.TB, addr string, srv *http.Server) { start(t, addr, srv, limit(5*time.Second)) }

func hello(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	fmt.Fprint(w, "hello ", string(b))
}

func newClient(t testing.TB, config *tls.Config, h2 bool) *http.Client {
	tr := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: h2}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: limit(10 * time.Second)}
}

func get(t testing.TB, c *http.Client, url string) *http.Response {
	t.Helper()
	resp, err := c.Get(url)
	require.NoError(t, err)
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 200, resp.StatusCode, "%s", b)
	return resp
}

// dial connects, and says something.
func dial(t testing.TB, addr, say string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(limit(10 * time.Second)))
	_, err = io.WriteString(c, say)
	require.NoError(t, err)
	return c
}

func init() { http.HandleFunc("/default", hello) }

// The user's handler and ConnState are called as before, the default handler too.
func TestServe(t *testing.T) {
	var states atomic.Int64
	r := start(t, "127.0.0.1:0", &http.Server{ConnState: func(net.Conn, http.ConnState) { states.Add(1) }}, time.Second)
	c := newClient(t, nil, false)
	resp := get(t, c, "http://"+r.addr+"/default")
	require.Empty(t, resp.Header.Get("Connection"))
	require.NotZero(t, states.Load())
	require.NoError(t, r.stop())
	_, err := net.Dial("tcp", r.addr)
	require.Error(t, err)
}

// A request in progress is answered, and so is the first one of a connection that has
// said nothing when the end comes, or half of its request.
func TestAnswersWhatWasAccepted(t *testing.T) {
	begun := make(chan struct{}, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			begun <- struct{}{}
			time.Sleep(limit(200 * time.Millisecond))
		}
		hello(w, r)
	})}
	r := start(t, "127.0.0.1:0", srv, limit(10*time.Second))
	conns := []net.Conn{dial(t, r.addr, ""), dial(t, r.addr, "POST / HT"), dial(t, r.addr, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nwo"), dial(t, r.addr, "POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")}
	rest := []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "TP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "rld", ""}
	<-begun
	ended := make(chan error)
	go func() { ended <- r.stop() }()
	time.Sleep(limit(400 * time.Millisecond))
	for i, c := range conns {
		_, err := io.WriteString(c, rest[i])
		require.NoError(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		require.NoError(t, err, i)
		require.Equal(t, 200, resp.StatusCode)
		require.Equal(t, i != 3 && i != 2, resp.Close, "%d: the handler of the others had begun", i)
		resp.Body.Close()
	}
	require.NoError(t, <-ended)
}

// What is queued when nobody takes over is accepted and answered.
func TestEmptiesTheQueue(t *testing.T) {
	for range count(30, 5) {
		r := start(t, "127.0.0.1:0", &http.Server{Handler: http.HandlerFunc(hello)}, limit(10*time.Second))
		var conns []net.Conn
		for range 40 {
			conns = append(conns, dial(t, r.addr, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
		}
		ended := make(chan error)
		go func() { ended <- r.stop() }()
		for _, c := range conns {
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			require.NoError(t, err)
			resp.Body.Close()
			c.Close()
		}
		require.NoError(t, <-ended)
	}
}

// The end takes no longer than the last answer, and what was idle for long isn't waited for.
func TestEndsSoon(t *testing.T) {
	r := start(t, "127.0.0.1:0", &http.Server{Handler: http.HandlerFunc(hello)}, limit(20*time.Second))
	heir(t, r.addr, &http.Server{Handler: http.HandlerFunc(hello)})
	for range 10 {
		get(t, newClient(t, nil, false), "http://"+r.addr)
	}
	time.Sleep(longTime + idleTime)
	begin := time.Now()
	require.NoError(t, r.stop())
	require.Less(t, time.Since(begin), limit(idleTime))
}

// What lasts longer than the grace is closed, and the error says so.
func TestGrace(t *testing.T) {
	for name, grace := range map[string]time.Duration{"of a while": 50 * time.Millisecond, "of none": -1} {
		t.Run(name, func(t *testing.T) {
			begun := make(chan struct{}, 1)
			gone := make(chan struct{})
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				begun <- struct{}{}
				<-r.Context().Done()
				close(gone)
			})}
			shut := make(chan struct{})
			srv.RegisterOnShutdown(func() { close(shut) })
			r := start(t, "127.0.0.1:0", srv, grace)
			dial(t, r.addr, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			dial(t, r.addr, "")
			<-begun
			require.Eventually(t, func() bool { return r.g.Stats().Accepted == 2 }, limit(5*time.Second), time.Millisecond)
			err := r.stop()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorContains(t, err, "lbhttp: 2 connections were closed")
			<-shut
			<-gone
		})
	}
}

// A connection that is idle when the grace is over has lost nothing.
func TestIdleAtTheEnd(t *testing.T) {
	r := start(t, "127.0.0.1:0", &http.Server{Handler: http.HandlerFunc(hello)}, -1)
	get(t, newClient(t, nil, false), "http://"+r.addr)
	require.NoError(t, r.stop())
}

// An idle HTTP/2 connection whose client doesn't close it doesn't hold up the end.
func TestIdleHTTP2(t *testing.T) {
	srv := &http.Server{Handler: http.HandlerFunc(hello), TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}}}
	r := start(t, "127.0.0.1:0", srv, limit(20*time.Second))
	c, err := tls.Dial("tcp", r.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	require.NoError(t, err)
	in := bufio.NewReader(c)
	_, err = in.Peek(9) // its settings
	require.NoError(t, err)
	time.Sleep(limit(idleTime))
	begin := time.Now()
	require.NoError(t, r.stop())
	require.Less(t, time.Since(begin), limit(goAwayTime+idleTime))
	said, err := io.ReadAll(in)
	require.NoError(t, err)
	require.Contains(t, string(said), "\x00\x00\x08\x07\x00\x00\x00\x00\x00", "no GOAWAY")
}

// A connection that has said nothing for longer than Shutdown waits for it isn't waited for.
func TestSilentConnection(t *testing.T) {
	t.Parallel()
	r := start(t, "127.0.0.1:0", &http.Server{Handler: http.HandlerFunc(hello)}, limit(60*time.Second))
	dial(t, r.addr, "")
	begin := time.Now()
	require.NoError(t, r.stop())
	require.Greater(t, time.Since(begin), newTime-time.Second)
	require.Less(t, time.Since(begin), limit(newTime+5*time.Second))
}

// The final answer tells that the connection ends, one of status 1xx before it doesn't; so
// does that to a request that offers an upgrade; and a handler finds all that net/http has.
func TestLastAnswer(t *testing.T) {
	begun, may, gone := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		switch r.URL.Path {
		case "/wait":
			begun <- struct{}{}
			<-may
		case "/hints":
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
		case "/flush":
			w.(http.Flusher).Flush()
			<-w.(http.CloseNotifier).CloseNotify() //lint:ignore SA1019 frameworks call it
			close(gone)
		case "/copy":
			io.Copy(w, strings.NewReader("hello"))
		case "/string":
			io.WriteString(w, "hello")
		case "/deadline":
			if err := rc.SetWriteDeadline(time.Now().Add(time.Hour)); err != nil {
				panic(err)
			}
			rc.Flush()
		}
	})}
	r := start(t, "127.0.0.1:0", srv, limit(20*time.Second))
	paths := []string{"/hints", "/flush", "/copy", "/string", "/deadline", "/"}
	var conns []net.Conn
	for range paths {
		conns = append(conns, dial(t, r.addr, ""))
	}
	dial(t, r.addr, "GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	ended := make(chan error, 1)
	go func() { ended <- r.stop() }()
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", r.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	}, limit(5*time.Second), time.Millisecond)
	time.Sleep(limit(20 * time.Millisecond))
	for i, c := range conns {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n", paths[i])
		in := bufio.NewReader(c)
		resp, err := http.ReadResponse(in, nil)
		require.NoError(t, err)
		if i == 0 {
			require.Equal(t, http.StatusEarlyHints, resp.StatusCode)
			require.False(t, resp.Close)
			resp, err = http.ReadResponse(in, nil)
			require.NoError(t, err)
		}
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.True(t, resp.Close, paths[i])
		if paths[i] == "/flush" {
			c.Close()
			<-gone
		}
		resp.Body.Close()
	}
	close(may)
	require.NoError(t, <-ended)
}

// A grace of 0 is no limit.
func TestNoLimit(t *testing.T) {
	begun := make(chan struct{}, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		time.Sleep(limit(300 * time.Millisecond))
	})}
	r := start(t, "127.0.0.1:0", srv, 0)
	c := dial(t, r.addr, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	require.NoError(t, r.stop())
	_, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
}

// Serving that ends by itself closes the group, and tells why.
func TestEndsByItself(t *testing.T) {
	srv := &http.Server{Handler: http.HandlerFunc(hello)}
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2)
	require.NoError(t, err)
	ended := make(chan error)
	go func() { ended <- Serve(context.Background(), g, srv, time.Second) }()
	get(t, newClient(t, nil, false), "http://"+g.Addr().String())
	shut := make(chan struct{})
	srv.RegisterOnShutdown(func() { close(shut) })
	require.NoError(t, srv.Shutdown(context.Background()))
	require.ErrorIs(t, <-ended, http.ErrServerClosed)
	require.ErrorIs(t, g.Close(), net.ErrClosed)
	<-shut
	closed, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2)
	require.NoError(t, err)
	require.NoError(t, closed.Close())
	require.ErrorIs(t, Serve(context.Background(), closed, &http.Server{}, time.Second), net.ErrClosed)
}

// What http.Server does it does here too, while it stops as well.
func TestIsAnHTTPServer(t *testing.T) {
	var log bytes.Buffer
	var logMu sync.Mutex
	srv := &http.Server{
		ErrorLog: stdlog.New(writer(func(b []byte) (int, error) {
			logMu.Lock()
			defer logMu.Unlock()
			return log.Write(b)
		}), "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/panic":
				panic("a test says so")
			case "/hijack":
				c, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					panic(err)
				}
				defer c.Close()
				fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
				rw.Flush()
				io.Copy(c, rw)
			case "/stream":
				for i := range 3 {
					fmt.Fprintln(w, i)
					http.NewResponseController(w).Flush()
					time.Sleep(limit(50 * time.Millisecond))
				}
			default:
				hello(w, r)
			}
		}),
	}
	for _, stops := range []bool{false, true} {
		t.Run(map[bool]string{false: "serves", true: "stops"}[stops], func(t *testing.T) {
			srv := &http.Server{Handler: srv.Handler, ErrorLog: srv.ErrorLog}
			r := start(t, "127.0.0.1:0", srv, limit(10*time.Second))
			says := []string{
				"GET / HTTP/1.0\r\n\r\n",
				"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
				"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n",
				"GET /hijack HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
				"GET /panic HTTP/1.1\r\nHost: x\r\n\r\n",
			}
			conns := make([]net.Conn, len(says))
			for i := range says {
				conns[i] = dial(t, r.addr, "")
			}
			ended := make(chan error, 1)
			if stops {
				go func() { ended <- r.stop() }()
				time.Sleep(limit(50 * time.Millisecond))
			}
			for i, c := range conns {
				_, err := io.WriteString(c, says[i])
				require.NoError(t, err)
				in := bufio.NewReader(c)
				if i == 4 {
					_, err = in.ReadByte()
					require.ErrorIs(t, err, io.EOF)
					continue
				}
				resp, err := http.ReadResponse(in, nil)
				require.NoError(t, err)
				switch i {
				case 1:
					require.Equal(t, 100, resp.StatusCode)
					io.WriteString(c, "world")
					resp, err = http.ReadResponse(in, nil)
					require.NoError(t, err)
					b, err := io.ReadAll(resp.Body)
					require.NoError(t, err)
					require.Equal(t, "hello world", string(b))
				case 2:
					b, err := io.ReadAll(resp.Body)
					require.NoError(t, err)
					require.Equal(t, "0\n1\n2\n", string(b))
				case 3:
					require.Equal(t, 101, resp.StatusCode)
					require.Equal(t, []string{"Upgrade"}, resp.Header["Connection"])
					io.WriteString(c, "echo\n")
					line, err := in.ReadString('\n')
					require.NoError(t, err)
					require.Equal(t, "echo\n", line)
				}
				resp.Body.Close()
			}
			if stops {
				require.NoError(t, <-ended, "the hijacked connection isn't the server's any more")
				io.WriteString(conns[3], "more\n")
				line, err := bufio.NewReader(conns[3]).ReadString('\n')
				require.NoError(t, err)
				require.Equal(t, "more\n", line)
			}
		})
	}
	logMu.Lock()
	defer logMu.Unlock()
	require.Contains(t, log.String(), "a test says so")
}

type writer func(b []byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

// A client resumes its TLS session at any member, and in HTTP/2 it is told that the
// connection ends.
func TestTLS(t *testing.T) {
	newServer := func() *http.Server {
		return &http.Server{Handler: http.HandlerFunc(hello), TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}}}
	}
	r := start(t, "127.0.0.1:0", newServer(), limit(10*time.Second))
	cache := tls.NewLRUClientSessionCache(8)
	for i := range 20 {
		c := newClient(t, &tls.Config{InsecureSkipVerify: true, ClientSessionCache: cache}, true)
		resp := get(t, c, "https://"+r.addr)
		require.Equal(t, "HTTP/2.0", resp.Proto)
		require.Equal(t, i > 0, resp.TLS.DidResume)
		c.CloseIdleConnections()
	}
	counts := make([]uint64, 0, 2)
	for _, l := range r.g.Listeners() {
		counts = append(counts, l.Stats().Accepted)
	}
	require.NotZero(t, min(counts[0], counts[1]), "one member had all: %v", counts)
	heir(t, r.addr, newServer())
	c := newClient(t, &tls.Config{InsecureSkipVerify: true}, true)
	get(t, c, "https://"+r.addr)
	require.NoError(t, r.stop())
	require.Equal(t, "HTTP/2.0", get(t, c, "https://"+r.addr).Proto)
}

// A server is restarted again and again under load, and no request fails, a POST on a
// connection that is kept neither.
func TestRestarts(t *testing.T) {
	for _, secure := range []bool{false, true} {
		for _, h2 := range []bool{false, true} {
			for _, takes := range []time.Duration{0, 50 * time.Millisecond} {
				if h2 && !secure {
					continue
				}
				t.Run(fmt.Sprintf("TLS %v, HTTP2 %v, %v", secure, h2, takes), func(t *testing.T) {
					t.Parallel()
					newServer := func() *http.Server {
						srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							time.Sleep(limit(takes))
							hello(w, r)
						})}
						if secure {
							srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate()}}
						}
						if !h2 {
							srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
						}
						return srv
					}
					now := start(t, "127.0.0.1:0", newServer(), limit(10*time.Second))
					d := startLoad(t, now.addr, 4, secure, h2)
					for range count(20, 3) {
						next := start(t, now.addr, newServer(), limit(10*time.Second))
						time.Sleep(limit(20 * time.Millisecond))
						require.NoError(t, now.stop())
						now = next
					}
					d.end()
				})
			}
		}
	}
}

// A load is clients that send GET and POST in turn, on connections that they keep.
type load struct {
	t             testing.TB
	stop          atomic.Bool
	all           sync.WaitGroup
	tried, failed atomic.Int64
}

func startLoad(t testing.TB, addr string, n int, secure, h2 bool) *load {
	d := &load{t: t}
	url := "http://" + addr
	if secure {
		url = "https://" + addr
	}
	for i := range n {
		d.all.Add(1)
		go func() {
			defer d.all.Done()
			c := newClient(t, &tls.Config{InsecureSkipVerify: true}, h2)
			defer c.CloseIdleConnections()
			for j := i; !d.stop.Load(); j++ {
				d.tried.Add(1)
				if err := d.one(c, url, j%2 == 0); err != nil {
					d.failed.Add(1)
					t.Log(err)
				}
			}
		}()
	}
	return d
}

func (d *load) one(c *http.Client, url string, post bool) error {
	var resp *http.Response
	var err error
	want := "hello "
	if post {
		want += "world"
		resp, err = c.Post(url, "text/plain", struct{ io.Reader }{strings.NewReader("world")}) // one that can't be sent again
	} else {
		resp, err = c.Get(url)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && string(b) != want {
		err = fmt.Errorf("%d %q", resp.StatusCode, b)
	}
	return err
}

func (d *load) end() {
	d.t.Helper()
	d.stop.Store(true)
	d.all.Wait()
	d.t.Logf("%d tried, %d lost", d.tried.Load(), d.failed.Load())
	require.Zero(d.t, d.failed.Load())
}

// newQuiet returns a server that writes no log.
func newQuiet() *http.Server { return &http.Server{ErrorLog: stdlog.New(io.Discard, "", 0)} }
