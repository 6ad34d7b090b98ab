//go:build unix && !aix

package lblisten

import (
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A peer that sends sockets without end doesn't use up the descriptors of the
// process that is the hub: the last quarter is for its own.
func TestHandoffPeerThatFloods(t *testing.T) {
	noLeaks(t)
	require.Equal(t, "ok\n", runWorker(t, "flooded", "LBLISTEN_TEST_PATH="+handoffPath(t)))
}

func init() { workers["flooded"] = flooded }

func flooded() {
	ln, err := Listen("tcp", "127.0.0.1:0", WithHandoff(os.Getenv("LBLISTEN_TEST_PATH")))
	must(err)
	c, err := net.Dial("unix", os.Getenv("LBLISTEN_TEST_PATH"))
	must(err)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	must(err)
	d := newDescriptor(fd)
	must(setFileLimit(128))
	w := newWire(c.(*net.UnixConn))
	w.send(frame{kind: frameHello, n: 1<<16 | 1, process: newID(), at: place{network: helloName}}, nil)
	kept := 0
	for n := range uint32(200) { // one after the other: the system limits descriptors on their way, too
		w.send(frame{kind: frameSocket, n: n + 1, id: newID(), at: place{network: "tcp", host: "::", port: 1}}, d)
		for answered := false; !answered; {
			f, d, err := w.read(limit(10 * time.Second))
			must(err)
			if d != nil {
				d.release()
			}
			if answered = f.kind == frameReply; answered && f.flags&flagOK != 0 {
				kept++
			}
		}
	}
	if kept > 96 {
		panic(fmt.Sprintf("the hub keeps %d sockets", kept))
	}
	for range 8 { // two descriptors each
		_, err := net.Dial("tcp", ln.Addr().String())
		must(err)
		_, err = ln.Accept()
		must(err)
	}
	fmt.Println("ok")
}
