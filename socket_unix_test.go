//go:build unix

package lblisten

// Sockets and other descriptors, and exec.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Every descriptor of the package is closed by exec: a child process has none,
// and when its parent closes, the address is free although the child lives.
func TestDescriptorsAreClosedByExec(t *testing.T) {
	beside(t)
	for _, opts := range []string{"kernel", "dispatcher", "kernel source", "dispatcher source", "kernel cpu", "kernel load", "kernel handoff", "dispatcher handoff"} {
		t.Run(opts, func(t *testing.T) {
			beside(t)
			if strings.HasPrefix(opts, "kernel") {
				modes[0].need(t)
			}
			if o, ok := strings.CutSuffix(opts, "handoff"); ok {
				opts = o + "handoff=" + handoffPath(t)
			}
			out := strings.TrimSpace(runWorker(t, "closeOnExec", "LBLISTEN_TEST_OPTIONS="+opts, "GORACE=atexit_sleep_ms=0"))
			if why, ok := strings.CutPrefix(out, "unsupported: "); ok {
				t.Skip(why)
			}
			t.Log(out)
		})
	}
}

func closeOnExecWorker() {
	names := os.Getenv("LBLISTEN_TEST_OPTIONS")
	opts := faultOptions(names)
	inherited := notClosedByExec() // from whoever runs the tests
	g, err := ListenGroup(context.Background(), "tcp", "127.0.0.1:0", 4, opts...)
	if errors.Is(err, ErrUnsupported) || errors.Is(err, unix.EPERM) {
		fmt.Println("unsupported:", err)
		return
	}
	must(err)
	address := g.Addr().String()
	ls := g.Listeners()
	must(ls[3].Close()) // a socket that is shared, and watched
	const clients = 20
	var open []net.Conn
	for range clients {
		c, err := net.Dial("tcp", address)
		must(err)
		open = append(open, c)
	}
	for i := 0; len(open) < 2*clients; i++ {
		if c, err := acceptBy(ls[i%3], limit(20*time.Millisecond)); err == nil {
			open = append(open, c)
		}
	}
	self, err := os.Executable()
	must(err)
	if strings.Contains(names, "handoff") { // one that is killed, whose sockets come here
		other := exec.Command(self)
		other.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=faultServer", "LBLISTEN_TEST_ADDRESS="+address)
		in, err := other.StdinPipe()
		must(err)
		defer in.Close()
		out, err := other.StdoutPipe()
		must(err)
		must(other.Start())
		_, err = bufio.NewReader(out).ReadString('\n')
		must(err)
		must(other.Process.Kill())
		other.Wait()
		for begin := time.Now(); strings.HasPrefix(names, "kernel") && g.Info().Sockets < 4+2; time.Sleep(time.Millisecond) {
			if time.Since(begin) > limit(5*time.Second) {
				panic(fmt.Sprintf("%+v", g.Info()))
			}
		}
	}
	if now := notClosedByExec(); !slices.Equal(now, inherited) {
		panic(fmt.Sprintf("descriptors %v are not closed by exec, %v were there before", now, inherited))
	}
	fds := openDescriptors()

	child := exec.Command(self)
	child.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=holdNothing")
	child.Stderr = os.Stderr
	in, err := child.StdinPipe()
	must(err)
	out, err := child.StdoutPipe()
	must(err)
	must(child.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	must(err)
	if want := fmt.Sprintln(inherited); line != want {
		panic(fmt.Sprintf("the child has descriptors %s, want %s", line, want))
	}
	must(g.Close())
	for _, c := range open {
		c.(*net.TCPConn).SetLinger(0) // no TIME_WAIT, which takes the address too
		c.Close()
	}
	ln, err := net.Listen("tcp", address)
	must(err)
	must(ln.Close())
	must(in.Close())
	must(child.Wait())
	fmt.Printf("%d descriptors, all closed by exec; the address is free while the child lives\n", fds)
}

// notClosedByExec returns the descriptors past standard error that exec keeps.
func notClosedByExec() (fds []int) {
	for fd := 3; fd < 4096; fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fds = append(fds, fd)
		}
	}
	return fds
}

func holdNothingWorker() {
	fmt.Println(notClosedByExec())
	io.Copy(io.Discard, os.Stdin)
}
