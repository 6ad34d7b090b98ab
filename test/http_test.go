package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// httpClients are clients whose connections are counted. Each is used by one
// goroutine at a time.
type httpClients struct {
	idle chan *http.Client
	uses atomic.Int64
}

func newHTTPClients(t testing.TB, n int, transport func() http.RoundTripper) *httpClients {
	c := &httpClients{idle: make(chan *http.Client, n)}
	for range n {
		c.idle <- &http.Client{Transport: transport(), Timeout: limit(20 * time.Second)}
	}
	t.Cleanup(c.closeIdle)
	return c
}

// http1 is a transport for HTTP/1.1.
func (g *group) http1(keepAlive bool) func() http.RoundTripper {
	return func() http.RoundTripper {
		return &http.Transport{
			DisableKeepAlives: !keepAlive,
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return g.dial(ctx) },
		}
	}
}

func (c *httpClients) closeIdle() {
	for range cap(c.idle) {
		client := <-c.idle
		client.CloseIdleConnections()
		c.idle <- client
	}
}

// get makes a request, checks the answer, and gives its connection up after
// every tenth, so that new ones are opened all the time.
func (c *httpClients) get(url string, protocol int) error {
	client := <-c.idle
	defer func() { c.idle <- client }()
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if string(b) != "hello" || resp.ProtoMajor != protocol {
		return fmt.Errorf("the answer is %q by %s", b, resp.Proto)
	}
	if c.uses.Add(1)%10 == 0 {
		client.CloseIdleConnections()
	}
	return nil
}

// A httpServer counts what it handles and the connections that it has open.
type httpServer struct {
	http.Server
	handled  atomic.Int64
	notTCP   atomic.Int64 // connections that aren't bare
	accepted atomic.Int64
	open     atomic.Int64
}

func newHTTPServer() *httpServer {
	s := new(httpServer)
	s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.handled.Add(1)
		io.WriteString(w, "hello")
	})
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if _, ok := c.(*net.TCPConn); !ok {
			s.notTCP.Add(1)
		}
		return ctx
	}
	s.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.accepted.Add(1)
			s.open.Add(1)
		case http.StateClosed, http.StateHijacked:
			s.open.Add(-1)
		}
	}
	return s
}

// shutdown ends a server whose clients are gone.
func (s *httpServer) shutdown(t testing.TB, served <-chan error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit(20*time.Second))
	defer cancel()
	require.NoError(t, s.Shutdown(ctx))
	require.ErrorIs(t, wait(t, served), http.ErrServerClosed)
}

// Members close under load until one is left, and no request fails. The
// connections are bare, so that the server has sendfile and splice.
func TestHTTP(t *testing.T) {
	for name, keepAlive := range map[string]bool{"keep-alive": true, "one request a connection": false} {
		t.Run(name, func(t *testing.T) {
			inRows(t, func(t *testing.T, g *group) {
				srv := newHTTPServer()
				served := g.start(srv.Serve)
				clients := newHTTPClients(t, 8, g.http1(keepAlive))
				l := startLoad(t, 8, func() error { return clients.get("http://"+g.addr(), 1) })
				g.leave(t, l, count(120, 20))
				l.end(t, g)
				require.Equal(t, l.answered.Load(), srv.handled.Load())
				require.Zero(t, srv.notTCP.Load())
				clients.closeIdle()
				srv.shutdown(t, served)
			})
		})
	}
}

// Two servers on one address, and one ends under load, in the order that the
// README advises: its listeners close first, and its open connections are waited
// for. Every request is answered, also of those that wait in the kernel at that
// moment, one of each client. Of the control there is only one server, so
// its queued connections are reset and what comes later is refused.
//
// With keep-alive net/http may close a connection as idle at the moment in which
// it reads a request from it. That one is handled, and sent again by the client.
func TestHTTPEndUnderLoad(t *testing.T) {
	for _, c := range []struct {
		name      string
		keepAlive bool
		end       func(*httpServer, context.Context) error
	}{
		{"Shutdown", false, func(s *httpServer, ctx context.Context) error { return s.Shutdown(ctx) }},
		{"Close", false, func(s *httpServer, _ context.Context) error { return s.Close() }},
		{"Shutdown with keep-alive", true, func(s *httpServer, ctx context.Context) error { return s.Shutdown(ctx) }},
		{"Close with keep-alive", true, func(s *httpServer, _ context.Context) error { return s.Close() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			inRows(t, func(t *testing.T, g *group) {
				one, two := newHTTPServer(), newHTTPServer()
				first := g.members
				if !g.control() {
					first = g.members[:len(g.members)/2]
				}
				oneServed, twoServed := make(chan error, len(first)), make(chan error, 1)
				gate := newGate()
				for _, m := range first {
					go func() { oneServed <- one.Serve(gated{m, gate}) }()
				}
				go func() {
					twoServed <- single(g.members[len(first):]).serve(func(l net.Listener) error { return two.Serve(gated{l, gate}) })
				}()

				clients := newHTTPClients(t, 8, g.http1(c.keepAlive))
				l := startLoad(t, 8, func() error { return clients.get("http://"+g.addr(), 1) })
				l.reach(t, count(120, 20))
				if !c.keepAlive {
					gate.shut()
					require.Eventually(t, func() bool {
						return g.dials.Load()-one.accepted.Load()-two.accepted.Load() == int64(cap(clients.idle))
					}, limit(20*time.Second), time.Millisecond)
				}
				for _, m := range first {
					require.NoError(t, m.Close())
				}
				if !c.keepAlive {
					gate.open()
				}
				for range first {
					require.ErrorIs(t, wait(t, oneServed), net.ErrClosed) // now ConnState knows all that was accepted
				}
				one.SetKeepAlivesEnabled(false)
				require.Eventually(t, func() bool { return one.open.Load() == 0 }, limit(20*time.Second), time.Millisecond)
				ctx, cancel := context.WithTimeout(context.Background(), limit(20*time.Second))
				defer cancel()
				require.NoError(t, c.end(one, ctx))

				check := func(handled int64) {
					again := handled - l.answered.Load()
					if !c.keepAlive {
						require.Zero(t, again)
						if g.control() {
							require.EqualValues(t, cap(clients.idle), l.failed.Load())
						}
					}
					require.GreaterOrEqual(t, again, int64(0))
					require.LessOrEqual(t, again, int64(cap(clients.idle)), "only what was under way is sent again")
				}
				if g.control() {
					l.stop.Store(true)
					l.wg.Wait()
					t.Logf("the control: %s; %d handled, %d connections", l, one.handled.Load(), g.dials.Load())
					require.Equal(t, l.sent.Load(), l.answered.Load()+l.refused.Load()+l.failed.Load())
					check(one.handled.Load())
					return
				}
				l.reach(t, count(120, 20))
				l.end(t, g)
				check(one.handled.Load() + two.handled.Load())
				require.NotZero(t, one.handled.Load())
				require.NotZero(t, two.handled.Load())
				clients.closeIdle()
				two.shutdown(t, twoServed)
			})
		})
	}
}
