package test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/require"
)

// A server behind a proxy sees the client's address in the header that the proxy
// sends, version 1 or 2, and answers with it.
func TestProxyProtocol(t *testing.T) {
	inRows(t, func(t *testing.T, g *group) {
		testProxyProtocol(t, g, func(l net.Listener) net.Listener { return &proxyproto.Listener{Listener: l} })
	})
	t.Run("Dispatch around it", func(t *testing.T) {
		noLeaks(t)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		g, err := dispatch(&proxyproto.Listener{Listener: ln, ReadHeaderTimeout: limit(10 * time.Second)})
		require.NoError(t, err)
		t.Cleanup(func() { g.close() })
		testProxyProtocol(t, g, func(l net.Listener) net.Listener { return l })
	})
}

func testProxyProtocol(t *testing.T, g *group, wrap func(net.Listener) net.Listener) {
	srv := newHTTPServer()
	srv.ConnContext = nil
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		srv.handled.Add(1)
		io.WriteString(w, r.RemoteAddr)
	})
	served := g.start(func(l net.Listener) error { return srv.Serve(wrap(l)) })
	var number atomic.Int64
	l := startLoad(t, 8, func() error {
		c, err := g.dial(context.Background())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(limit(20 * time.Second)))
		n := int(number.Add(1))
		source := &net.TCPAddr{IP: net.IPv4(192, 0, 2, byte(n>>8)), Port: 1 + n&0xff}
		header := proxyproto.HeaderProxyFromAddrs(byte(1+n%2), source, &net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 80})
		if _, err := header.WriteTo(c); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if string(got) != source.String() {
			return fmt.Errorf("the server saw %s, want %s", got, source)
		}
		return nil
	})
	g.leave(t, l, count(100, 20))
	l.end(t, g)
	require.Equal(t, l.answered.Load(), srv.handled.Load())
	srv.shutdown(t, served)
}
