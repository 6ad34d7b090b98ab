package lblisten

// Groups: Serve, and who inherits when they close.

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Serve runs every member, ends all at the first error, returns that one, and
// only when every serve has returned.
func TestServe(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", m.opt)
		boom := errors.New("boom")
		var running atomic.Int64
		err := g.Serve(func(l net.Listener) error {
			running.Add(1)
			defer running.Add(-1)
			if l == net.Listener(ls[2]) {
				for running.Load() < 4 {
					time.Sleep(time.Millisecond)
				}
				return boom
			}
			_, err := l.Accept()
			time.Sleep(10 * time.Millisecond)
			return err
		})
		require.Equal(t, boom, err)
		require.Zero(t, running.Load())
		require.ErrorIs(t, g.Close(), net.ErrClosed, "Serve has closed it")
	})
}

// An error around net.ErrClosed that has another cause than its member's end is an
// error like any other: nobody would accept from the member any more.
func TestServeOfAnotherThingsEnd(t *testing.T) {
	noLeaks(t)
	g, ls := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithLB())
	late := time.AfterFunc(limit(10*time.Second), func() {
		t.Error("the group goes on")
		g.Close()
	})
	defer late.Stop()
	other := fmt.Errorf("the database: %w", net.ErrClosed)
	require.Equal(t, other, g.Serve(func(l net.Listener) error {
		if l == net.Listener(ls[0]) {
			return other
		}
		_, err := l.Accept()
		return err
	}))
}

// A serve that returns nil ends nobody else.
func TestServeReturnsNil(t *testing.T) {
	noLeaks(t)
	g, _ := newTestGroup(t, 3, "tcp", "127.0.0.1:0", WithLB())
	require.NoError(t, g.Serve(func(net.Listener) error { return nil }))
	require.NoError(t, g.Close())
}

// A member that is closed while the group is served ends nobody else, and what
// waits for it is served by its siblings.
func TestServeGoesOnWhenAMemberCloses(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
		serving, served := make(chan struct{}, 3), make(chan error, 1)
		go func() {
			served <- g.Serve(func(l net.Listener) error {
				serving <- struct{}{}
				for {
					c, err := l.Accept()
					if err != nil {
						return err
					}
					go func() { // io.Copy would splice, by pipes that it keeps
						b := make([]byte, 1)
						io.ReadFull(c, b)
						c.Write(b)
						c.Close()
					}()
				}
			})
		}()
		for range 3 {
			<-serving
		}
		d := startLoad(4, "tcp", g.Addr().String())
		require.NoError(t, ls[1].Close())
		require.Eventually(t, func() bool { return d.served.Load() > int64(count(200, 20)) }, limit(20*time.Second), time.Millisecond)
		d.end(t, false)
		require.NoError(t, g.Close())
		require.ErrorIs(t, <-served, net.ErrClosed)
	})
}

// A serve that panics and recovers ends nobody else, and what is in its queue
// is served: by the siblings if it closes its listener, by itself if it goes on.
func TestPanicInServe(t *testing.T) {
	for _, goesOn := range []bool{true, false} {
		t.Run(map[bool]string{true: "goes on", false: "closes"}[goesOn], func(t *testing.T) {
			inModes(t, func(t *testing.T, m mode) {
				g, _ := newTestGroup(t, 3, "tcp", "127.0.0.1:0", m.opt)
				n := count(200, 30)
				died := int64(1)
				if goesOn {
					died = 10
				}
				conns := queueUp(t, g.Addr(), n)
				var panics, accepted atomic.Int64
				var wg sync.WaitGroup
				handle := func(c net.Conn) {
					if panics.Add(1) <= died {
						c.Close()
						panic("a test says so")
					}
					accepted.Add(1)
					wg.Add(1)
					go func() {
						defer wg.Done()
						echoConn(c)
					}()
				}
				loop := func(l net.Listener) (err error) {
					defer func() {
						if recover() != nil && !goesOn {
							l.Close()
						}
					}()
					for {
						c, err := l.Accept()
						if err != nil {
							return err
						}
						handle(c)
					}
				}
				ended := make(chan error)
				go func() {
					ended <- g.Serve(func(l net.Listener) error {
						for {
							if err := loop(l); err != nil || !goesOn {
								return err
							}
						}
					})
				}()
				served := answered(conns)
				for _, c := range conns {
					c.Close()
				}
				require.NoError(t, g.Close())
				require.ErrorIs(t, <-ended, net.ErrClosed)
				wg.Wait()
				t.Logf("%d tried, %d lost; %d died in a panic", n, n-served-int(died), died)
				require.Equal(t, n, served+int(died))
			})
		})
	}
}

// Members of a group that closes don't inherit from each other; a member that
// somebody else opened on the address inherits from all.
func TestGroupCloseLeavesTheRestToOthers(t *testing.T) {
	inModes(t, func(t *testing.T, m mode) {
		g, _ := newTestGroup(t, 4, "tcp", "127.0.0.1:0", m.opt)
		other := joinTest(t, g.Listeners()[0], m.opt)
		clients := queueUp(t, g.Addr(), 25)
		require.NoError(t, g.Close())
		require.Equal(t, 1, other.Info().Members)
		for range clients {
			n := answer(t, acceptWithin(t, other))
			wantAnswer(t, clients[n], n)
		}
		require.ErrorIs(t, g.Close(), net.ErrClosed)
	})
}
