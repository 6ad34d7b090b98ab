package test

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/valyala/fasthttp"
)

// fasthttp takes the end of a listener from the text of its error, and has
// workers that hold connections.
func TestFastHTTP(t *testing.T) {
	for name, keepAlive := range map[string]bool{"keep-alive": true, "one request a connection": false} {
		t.Run(name, func(t *testing.T) {
			inRows(t, func(t *testing.T, g *group) {
				var handled atomic.Int64
				srv := &fasthttp.Server{
					NoDefaultDate:         true, // its clock is a goroutine that nobody can end
					MaxIdleWorkerDuration: 50 * time.Millisecond,
					Handler: func(ctx *fasthttp.RequestCtx) {
						handled.Add(1)
						ctx.WriteString("hello")
					},
				}
				served := g.start(srv.Serve)
				clients := newHTTPClients(t, 8, g.http1(keepAlive))
				l := startLoad(t, 8, func() error { return clients.get("http://"+g.addr(), 1) })
				g.leave(t, l, count(150, 20))
				l.end(t, g)
				require.Equal(t, l.answered.Load(), handled.Load())
				clients.closeIdle()
				err := srv.Shutdown()
				if !g.control() {
					require.ErrorIs(t, err, net.ErrClosed) // of the members that were closed before
				} else {
					require.NoError(t, err)
				}
				require.NoError(t, wait(t, served))
			})
		})
	}
}
