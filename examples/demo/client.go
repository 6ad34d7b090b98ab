package main

// The clients: a burst of them, who each dial, send a byte, and wait until it
// comes back. All keep their connection until the round is over, so that no
// port is used twice in a round as long as nobody is reset.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// patience is how long a client waits to be connected, and then for its
// answer. Being lost shows at once, as a reset, on most systems; this is for a
// connection that nobody ever takes, and has to outlast a busy machine.
const patience = 10 * time.Second

type burst struct {
	addr    string
	clients []client
	ready   chan struct{} // see awaitReady
	target  int64         // clients that make it ready
	passed  atomic.Int64  // clients on their way to target
	reading chan struct{} // closed by readAnswers
	done    chan struct{} // every client is

	// Set when done is closed.
	served              []int // the ports of these clients
	refused, unanswered int
	why                 error // of the first unanswered client
}

type client struct {
	conn    *net.TCPConn
	refused bool
	err     error // why it has no answer
	failed  error // it could not even dial: the experiment is at fault
}

// startBurst lets n clients loose on addr. If the workers stand still, most
// clients at a time dial, and all are connected at the end; if not, most at a
// time are anywhere between dialling and having their answer.
func startBurst(addr string, n, most int, standing bool) *burst {
	b := &burst{addr: addr, clients: make([]client, n), target: int64(n / 2),
		ready: make(chan struct{}), reading: make(chan struct{}), done: make(chan struct{})}
	if standing {
		b.target = int64(n)
	} else {
		b.readAnswers()
	}
	if b.target == 0 {
		close(b.ready)
	}
	go func() {
		defer close(b.done)
		slots := make(chan struct{}, most)
		var all sync.WaitGroup
		for i := range b.clients {
			slots <- struct{}{}
			all.Add(1)
			go func() {
				defer all.Done()
				c := &b.clients[i]
				c.connect(addr)
				if standing {
					b.pass()
					<-slots
					<-b.reading
					c.readAnswer()
				} else {
					c.readAnswer()
					b.pass()
					<-slots
				}
			}()
		}
		all.Wait()
		b.count()
	}()
	return b
}

func (b *burst) pass() {
	if b.passed.Add(1) == b.target {
		close(b.ready)
	}
}

// awaitReady waits until all clients are connected, if the workers stand still,
// and else until half of them are through.
func (b *burst) awaitReady(ctx context.Context) error {
	select {
	case <-b.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readAnswers lets the clients of workers that stood still wait for their
// answers. Their patience begins now.
func (b *burst) readAnswers() {
	select {
	case <-b.reading:
	default:
		close(b.reading)
	}
}

// wait waits until all clients have their answer, or none to expect.
func (b *burst) wait(ctx context.Context) error {
	select {
	case <-b.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	for i := range b.clients {
		if err := b.clients[i].failed; err != nil {
			b.close()
			return fmt.Errorf("a client could not dial (try fewer -conns): %w", err)
		}
	}
	return nil
}

// close ends all connections.
func (b *burst) close() {
	for i := range b.clients {
		if c := b.clients[i].conn; c != nil {
			c.Close()
		}
	}
}

func (b *burst) count() {
	for i := range b.clients {
		switch c := &b.clients[i]; {
		case c.refused:
			b.refused++
		case c.err != nil:
			if b.unanswered++; b.unanswered == 1 {
				b.why = innermost(c.err)
			}
		case c.failed == nil:
			b.served = append(b.served, c.conn.LocalAddr().(*net.TCPAddr).Port)
		}
	}
}

// connect dials and sends the byte.
func (c *client) connect(addr string) {
	d := net.Dialer{Timeout: patience, KeepAlive: -1}
	conn, err := d.Dial("tcp4", addr)
	if err != nil {
		// By the text, because the errors of plan9 and Windows have no names in
		// package syscall.
		var netErr net.Error
		switch text := err.Error(); {
		case strings.Contains(text, "refused"):
			c.refused = true
		case errors.As(err, &netErr) && netErr.Timeout(),
			strings.Contains(text, "reset"): // connected, but gone before Dial returned
			c.err = err
		default:
			c.failed = err
		}
		return
	}
	c.conn = conn.(*net.TCPConn)
	// A reset instead of a goodbye: TIME_WAIT would keep the port for a minute,
	// and they would run out.
	c.conn.SetLinger(0)
	_, c.err = c.conn.Write([]byte{'?'})
}

// readAnswer waits for the byte.
func (c *client) readAnswer() {
	if c.conn == nil || c.err != nil {
		return
	}
	c.conn.SetReadDeadline(time.Now().Add(patience))
	_, c.err = c.conn.Read(make([]byte, 1))
}

// innermost returns the error without the addresses around it.
func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
