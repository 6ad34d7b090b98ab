//go:build unix && !aix

package lblisten

// What the processes of a handoff say to each other, and how: frames on a unix
// stream socket, some of which bring one descriptor. Nothing here knows what
// they mean; that is in handoff_link_unix.go (a process) and
// handoff_hubpool_unix.go (the hub). What is needed to pass a descriptor on is here
// too; whether it is the right one isn't (handoff_pool_unix.go).
//
// A frame is
//
//	length  uint16, of the rest
//	kind    uint8
//	flags   uint8
//	n       uint32
//	id      [16]byte, of a socket
//	process [16]byte
//	port    uint16
//	space   uint64, a network namespace
//	device  int32, the index of an interface
//	network, sub, host: strings of up to 255 bytes, each after its length in a byte
//
// in big endian. What follows in the length is ignored, and so is a frame of a
// kind that isn't known: that is room for later versions. A process speaks the
// last two versions, because a handoff matters most during an upgrade; so far
// there is one.

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	frameHello  = iota + 1 // to the hub: n is the lowest version <<16 and the highest; back: the one to speak
	frameHas               // to the hub: I hold this socket already
	frameSynced            // to the hub: that is all I hold, and I knew n processes; back: you know everything
	frameWant              // from the hub: send me this socket
	frameSocket            // with a descriptor. To the hub: keep it, pass it on; from it: keep it. Wants an answer if n isn't 0
	frameOwner             // to the hub: I want to accept from it, or not any more; from it: process does, or nobody if that is zero
	frameDrop              // to the hub: it never listened; from it: forget it
	frameBound             // both: the address of a socket, which wasn't known before
	frameOn                // to the hub: I listen on the address
	frameOff               // to the hub: I don't any more, others may have its sockets; the answer is OK if others listen
	framePeers             // from the hub: n processes listen on the address, and hold all its sockets
	frameReply             // both: the answer to n
	frameBeat              // both: I live
)

const (
	flagOK       = 1 << iota // in an answer
	flagBalanced             // the socket is one of the kernel's group
	flagMine                 // the sender accepts from the socket
)

// helloName is in the network field of a hello.
const helloName = "lblisten"

type (
	socketID  [16]byte
	processID [16]byte
)

func newID() (id [16]byte) {
	rand.Read(id[:]) // never fails: from Go 1.24 it says so, before that it is /dev/urandom
	return id
}

type frame struct {
	kind, flags byte
	n           uint32
	id          socketID
	process     processID
	at          place  // the address of a group
	sub         string // the network of the socket, where a member has two
}

const (
	frameFixed = 1 + 1 + 4 + 16 + 16 + 2 + 8 + 4
	frameMost  = 2 + frameFixed + 3*(1+255)
)

var errFrame = errors.New("a message that makes no sense")

// append appends the encoded frame to b.
func (f *frame) append(b []byte) []byte {
	begin := len(b)
	b = append(b, 0, 0, f.kind, f.flags)
	b = binary.BigEndian.AppendUint32(b, f.n)
	b = append(b, f.id[:]...)
	b = append(b, f.process[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(f.at.port))
	b = binary.BigEndian.AppendUint64(b, f.at.space)
	b = binary.BigEndian.AppendUint32(b, uint32(f.at.device))
	for _, s := range []string{f.at.network, f.sub, f.at.host} {
		s = s[:min(len(s), 255)]
		b = append(append(b, byte(len(s))), s...)
	}
	binary.BigEndian.PutUint16(b[begin:], uint16(len(b)-begin-2))
	return b
}

// decodeFrame takes a frame off b. It returns how many bytes it took, 0 if there
// is no whole frame yet.
func decodeFrame(b []byte) (f frame, n int, err error) {
	if len(b) < 2 {
		return f, 0, nil
	}
	length := int(binary.BigEndian.Uint16(b))
	if length < frameFixed+3 || length > 4*frameMost {
		return f, 0, errFrame
	}
	if len(b) < 2+length {
		return f, 0, nil
	}
	b = b[2 : 2+length]
	f.kind, f.flags, f.n = b[0], b[1], binary.BigEndian.Uint32(b[2:])
	f.id, f.process = socketID(b[6:22]), processID(b[22:38])
	f.at.port = int(binary.BigEndian.Uint16(b[38:]))
	f.at.space = binary.BigEndian.Uint64(b[40:])
	f.at.device = int(int32(binary.BigEndian.Uint32(b[48:])))
	b = b[frameFixed:]
	for _, s := range []*string{&f.at.network, &f.sub, &f.at.host} {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return f, 0, errFrame
		}
		*s = string(b[1 : 1+b[0]])
		b = b[1+b[0]:]
	}
	return f, 2 + length, nil
}

// A descriptor is a raw file descriptor that is closed with its last use. It is
// no *os.File, because that would have the runtime's poller wait on it.
type descriptor struct {
	fd   int
	refs atomic.Int32
}

func newDescriptor(fd int) *descriptor {
	d := &descriptor{fd: fd}
	d.refs.Store(1)
	return d
}

func (d *descriptor) hold() *descriptor {
	d.refs.Add(1)
	return d
}

func (d *descriptor) release() {
	if d.refs.Add(-1) == 0 {
		unix.Close(d.fd)
	}
}

var (
	// silentAfter is how long a process may be silent before the others take it
	// for gone. It says something every beatEvery.
	silentAfter = 3 * time.Second
	beatEvery   = time.Second

	// exchangeTime is the most that an exchange with other processes takes.
	exchangeTime = time.Second
)

const (
	// messageDescriptors is the most descriptors that one message may bring. The
	// package sends one.
	messageDescriptors = 64

	// lastWords is how long a wire that is closed may take to write what is queued.
	lastWords = 50 * time.Millisecond

	queuedFrames = 1 << 16
)

// A wire is a connection between two processes of a handoff. Its reader is who
// calls read; writing is the goroutine's that newWire starts, so that send never
// blocks.
type wire struct {
	c *net.UnixConn

	in  []byte // not decoded yet
	fds []int  // that no frame has taken yet

	// mu guards queue and closed, and is held while a deadline for writing is set,
	// so that the one of close stays. No other lock is taken under it, nothing waits.
	mu     sync.Mutex
	queue  []parcel
	closed bool
	more   chan struct{} // something was queued, or closed is set; holds one
	ended  chan struct{} // the writer has ended
}

// A parcel is a frame on its way, with its descriptor, if it has one.
type parcel struct {
	f frame
	d *descriptor
}

func newWire(c *net.UnixConn) *wire {
	w := &wire{c: c, more: make(chan struct{}, 1), ended: make(chan struct{})}
	go w.write()
	return w
}

// send queues a frame, and a use of the descriptor.
func (w *wire) send(f frame, d *descriptor) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
		return
	case len(w.queue) >= queuedFrames: // a peer that doesn't read
		w.c.Close()
		return
	case d != nil:
		d.hold()
	}
	w.queue = append(w.queue, parcel{f, d})
	w.signal()
}

func (w *wire) signal() {
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// write writes what is queued, and a beat now and then, until close.
func (w *wire) write() {
	defer close(w.ended)
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	for {
		w.mu.Lock()
		queue, closed := w.queue, w.closed
		w.queue = nil
		w.mu.Unlock()
		for i, p := range queue {
			err := w.writeOne(p)
			if p.d != nil {
				p.d.release()
			}
			if err != nil {
				w.c.Close() // the reader sees it
				for _, p := range queue[i+1:] {
					if p.d != nil {
						p.d.release()
					}
				}
				break
			}
		}
		if closed {
			return
		}
		select {
		case <-w.more:
		case <-beat.C:
			if w.writeOne(parcel{f: frame{kind: frameBeat}}) != nil {
				w.c.Close()
			}
		}
	}
}

func (w *wire) writeOne(p parcel) error {
	b := p.f.append(make([]byte, 0, frameMost))
	var rights []byte
	if p.d != nil {
		rights = unix.UnixRights(p.d.fd)
	}
	w.mu.Lock()
	if !w.closed {
		w.c.SetWriteDeadline(time.Now().Add(exchangeTime))
	}
	w.mu.Unlock()
	n, _, err := w.c.WriteMsgUnix(b, rights, nil)
	if err == nil && n < len(b) {
		_, err = w.c.Write(b[n:])
	}
	return err
}

// close ends the wire, after what is queued if the peer takes it.
func (w *wire) close() {
	w.mu.Lock()
	w.closed = true
	w.c.SetWriteDeadline(time.Now().Add(lastWords))
	w.mu.Unlock()
	w.signal()
	<-w.ended
	w.c.Close()
}

// isCut tells whether the other end is closed, although not all that it has said
// may have been read.
func (w *wire) isCut() bool {
	conn, err := w.c.SyscallConn()
	if err != nil {
		return true
	}
	cut := false
	err = conn.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLHUP}} // macOS wants to be asked for it
		n, err := unix.Poll(p, 0)
		for err == unix.EINTR {
			n, err = unix.Poll(p, 0)
		}
		cut = n > 0 && p[0].Revents&unix.POLLHUP != 0
	})
	return cut || err != nil
}

// drain closes the descriptors that came without a frame. It is the reader's.
func (w *wire) drain() {
	for _, fd := range w.fds {
		unix.Close(fd)
	}
	w.fds = nil
}

// read returns the next frame, and its descriptor if it brings one. It fails if
// the peer is silent for longer than within.
func (w *wire) read(within time.Duration) (f frame, d *descriptor, err error) {
	for {
		f, n, err := decodeFrame(w.in)
		if err != nil {
			return f, nil, err
		}
		if n > 0 {
			w.in = w.in[n:]
			if f.kind == frameSocket {
				if len(w.fds) == 0 {
					return f, nil, fmt.Errorf("%w: it is to bring a descriptor and doesn't", errFrame)
				}
				d = newDescriptor(w.fds[0])
				w.fds = w.fds[1:]
			}
			return f, d, nil
		}
		if err := w.fill(within); err != nil {
			return f, nil, err
		}
	}
}

// fill reads more.
func (w *wire) fill(within time.Duration) error {
	buf := make([]byte, 8*frameMost)
	oob := make([]byte, unix.CmsgSpace(4*messageDescriptors))
	w.c.SetReadDeadline(time.Now().Add(within))
	n, oobn, flags, _, err := w.c.ReadMsgUnix(buf, oob)
	if oobn > 0 {
		if err := w.take(oob[:oobn]); err != nil {
			return err
		}
	}
	switch {
	case err != nil:
		return err
	case flags&unix.MSG_CTRUNC != 0:
		return fmt.Errorf("descriptors were cut off: too many in one message, or %w", unix.EMFILE)
	case n == 0:
		return net.ErrClosed
	case len(w.fds) > messageDescriptors:
		return fmt.Errorf("%w: descriptors that belong to nothing", errFrame)
	}
	w.in = append(w.in, buf[:n]...)
	return nil
}

// take takes descriptors out of control messages.
func (w *wire) take(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return os.NewSyscallError("recvmsg", err)
	}
	for i := range messages {
		if messages[i].Header.Level != unix.SOL_SOCKET || messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return os.NewSyscallError("recvmsg", err)
		}
		w.fds = append(w.fds, fds...)
	}
	return nil
}

// duplicate returns a descriptor of its own for a socket.
func duplicate(fd uintptr) (*descriptor, error) {
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return newDescriptor(dup), nil
}

// isShortage tells whether an error is one of a shortage, which may pass, and not
// of a wrong path.
func isShortage(err error) bool {
	for _, e := range []syscall.Errno{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EIO, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
