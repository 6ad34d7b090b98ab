package lblisten_test

// Programs to start from. Those with an output comment are run by the tests.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lblisten/lblisten"
)

// dial connects to a listener, and says a word.
func dial(addr net.Addr, word string) net.Conn {
	c, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		panic(err)
	}
	io.WriteString(c, word)
	return c
}

// hear accepts a connection and returns what the client said until it closed.
func hear(ln net.Listener) string {
	c, err := ln.Accept()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	b, _ := io.ReadAll(c)
	return string(b)
}

// A server with four accept loops that shuts down without losing a request that
// it could have answered. Start several of it, and any of them can be stopped,
// restarted or killed.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	g, err := lblisten.ListenGroup(ctx, "tcp", ":8080", 4, lblisten.WithHandoff("/run/app/handoff"))
	if err != nil {
		slog.Error("cannot listen", "error", err)
		return
	}
	var stopping atomic.Bool
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stopping.Load() {
			w.Header().Set("Connection", "close") // a busy client goes to another process
		}
		fmt.Fprintln(w, "hello")
	})}
	served := make(chan error, 1)
	go func() { served <- g.Serve(srv.Serve) }()
	select {
	case err := <-served:
		slog.Error("cannot serve", "error", err)
		return
	case <-ctx.Done():
	}
	g.Close() // from here on the other processes accept
	<-served
	stopping.Store(true)
	time.Sleep(250 * time.Millisecond) // for requests of connections that were accepted last
	last, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	srv.Shutdown(last)
}

func ExampleListen() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithLB()) // was: net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
	dial(ln.Addr(), "hello").Close()
	fmt.Println(hear(ln))
	// Output: hello
}

// A second Listen on the address joins the first. What waits in the queue of one
// that closes comes out of the other.
func ExampleListen_siblings() {
	a, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithLB())
	if err != nil {
		fmt.Println(err)
		return
	}
	b, err := lblisten.Listen("tcp", a.Addr().String(), lblisten.WithLB())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer b.Close()
	for range 10 { // they wait in the queues of both
		dial(a.Addr(), "hello").Close()
	}
	a.Close()
	n := 0
	for range 10 {
		if hear(b) == "hello" {
			n++
		}
	}
	fmt.Println(n, "of 10")
	// Output: 10 of 10
}

func ExampleListenContext() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // for a look-up, if it is a name
	defer cancel()
	ln, err := lblisten.ListenContext(ctx, "tcp", "127.0.0.1:0", lblisten.WithLB())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
	fmt.Println(ln.Addr().(*net.TCPAddr).IP)
	// Output: 127.0.0.1
}

func ExampleListenGroup() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	fmt.Println(len(g.Listeners()), "members on one port:", g.Info().Members == 4)
	// Output: 4 members on one port: true
}

func ExampleGroup_Serve() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4)
	if err != nil {
		fmt.Println(err)
		return
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })}
	done := make(chan error)
	go func() { done <- g.Serve(srv.Serve) }()

	resp, err := http.Get("http://" + g.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	fmt.Println(string(body))

	srv.Shutdown(context.Background())
	fmt.Println(<-done)
	// Output:
	// hello
	// http: Server closed
}

// What waits when one member closes is inherited by the others; when all close, it
// is reset by the kernel, unless other processes inherit.
func ExampleListener_Close() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2)
	if err != nil {
		fmt.Println(err)
		return
	}
	a, b := g.Listeners()[0], g.Listeners()[1]
	a.Close()
	_, err = a.Accept()
	fmt.Println(errors.Is(err, net.ErrClosed))
	dial(b.Addr(), "hello").Close()
	fmt.Println(hear(b))
	g.Close()
	// Output:
	// true
	// hello
}

func ExampleListener_SetDeadline() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 1)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	l := g.Listeners()[0]
	l.SetDeadline(time.Now().Add(10 * time.Millisecond))
	_, err = l.Accept()
	fmt.Println(errors.Is(err, os.ErrDeadlineExceeded))
	// Output: true
}

func ExampleListener_AcceptTCP() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 1)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	client := dial(g.Addr(), "")
	defer client.Close()
	c, err := g.Listeners()[0].AcceptTCP()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	fmt.Println(c.CloseWrite())
	// Output: <nil>
}

// Info tells what you got, and why it isn't more.
func ExampleListener_Info() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithDispatcher())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
	info := ln.(*lblisten.Listener).Info()
	fmt.Println("balancer:", info.Balancer)
	fmt.Println("steering:", info.Steering)
	fmt.Println("if it closed:", info.OnClose)
	fmt.Println("if it were killed:", info.OnKill)
	fmt.Println("something is missing:", info.Reason != nil)
	// Output:
	// balancer: dispatcher
	// steering: flow
	// if it closed: none
	// if it were killed: none
	// something is missing: true
}

func ExampleListener_Stats() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 2, lblisten.WithDispatcher())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	l := g.Listeners()[1]
	for range 3 {
		dial(l.Addr(), "hello").Close()
		hear(l)
	}
	fmt.Println(l.Stats().Accepted, "of", g.Stats().Accepted)
	// Output: 3 of 3
}

// Dispatch fans out a listener that somebody else has opened: systemd, a parent
// process, package tls, a PROXY protocol library.
func ExampleDispatch() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	g, err := lblisten.Dispatch(ln, 4) // which closes ln in the end
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	dial(g.Addr(), "hello").Close()
	fmt.Println(hear(g.Listeners()[2]))
	// Output: hello
}

func ExampleWithLB() {
	for range 2 {
		ln, err := lblisten.Listen("tcp", "127.0.0.1:54321", lblisten.WithLB())
		if err != nil {
			fmt.Println(err)
			return
		}
		defer ln.Close()
	}
}

// The dispatcher balances between the loops of one process on every system, and
// gives nothing to a loop that is busy.
func ExampleWithDispatcher() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, lblisten.WithDispatcher())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	fmt.Println(g.Info().Balancer, g.Info().Sockets)
	// Output: dispatcher 1
}

func ExampleWithRequireKernel() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithRequireKernel())
	if errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system's kernel doesn't balance:", err)
		return
	}
	if err == nil {
		ln.Close()
	}
}

// Plain SO_REUSEPORT promises no balancing, and joins programs that set it
// themselves.
func ExampleWithReusePort() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithReusePort())
	if errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system has no SO_REUSEPORT that is safe:", err)
		return
	}
	if err == nil {
		ln.Close()
	}
}

// All connections of a client go to the same member.
func ExampleWithSteering() {
	g, err := lblisten.ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4,
		lblisten.WithDispatcher(), lblisten.WithSteering(lblisten.SteerSource))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer g.Close()
	fmt.Println(g.Info().Steering)
	// Output: source
}

// Processes that name the same path hold each other's sockets: what is in the
// queue of one that is killed is accepted by the others.
func ExampleWithHandoff() {
	dir, err := os.MkdirTemp("", "lb") // a service has one of its own, as /run/app
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithHandoff(filepath.Join(dir, "handoff")))
	if errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system passes no descriptors:", err)
		return
	}
	if err == nil {
		ln.Close()
	}
}

// The unit of the service has FileDescriptorStoreMax=64.
func ExampleWithSystemd() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithSystemd())
	if errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system has no systemd:", err)
		return
	}
	if err == nil {
		ln.Close()
	}
}

// A program that outlives the processes of a service holds their sockets meanwhile.
func ExampleKeep() {
	dir, err := os.MkdirTemp("", "lb") // a service has one of its own, as /run/app
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	ctx, stop := context.WithCancel(context.Background())
	stop() // when the program ends
	if err := lblisten.Keep(ctx, filepath.Join(dir, "handoff")); errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system passes no descriptors:", err)
	}
}

func ExampleWithBacklog() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithLB(), lblisten.WithBacklog(64))
	if errors.Is(err, lblisten.ErrUnsupported) {
		fmt.Println("this system sets its own:", err)
		return
	}
	if err == nil {
		ln.Close()
	}
}

func ExampleWithListenConfig() {
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithLB(), lblisten.WithListenConfig(net.ListenConfig{
		KeepAlive: time.Minute,
		Control: func(network, address string, c syscall.RawConn) error {
			fmt.Println("before bind:", network)
			return nil
		},
	}))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
}

// On Linux an unprivileged process can have its queue inherited by the kernel, if
// a privileged one has pinned the program before: see examples/pin.
func ExampleWithPinnedProgram() {
	ln, err := lblisten.Listen("tcp", ":8080", lblisten.WithPinnedProgram("/sys/fs/bpf/lblisten"))
	if err != nil {
		slog.Error("cannot listen", "error", err)
		return
	}
	defer ln.Close()
}

func ExampleWithLogger() {
	var out strings.Builder
	logger := slog.New(slog.NewTextHandler(&out, nil))
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithDispatcher(), lblisten.WithLogger(logger))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer ln.Close()
	fmt.Println(strings.Contains(out.String(), "members joined"))
	// Output: true
}
