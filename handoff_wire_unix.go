//go:build unix && !aix

package lblisten

// What the processes of a handoff say to each other, as bytes on a unix stream socket.
// Nothing here knows what it means: that is in handoff_pool_unix.go.
//
// A frame is
//
//	length  uint16, of the rest
//	kind    uint8
//	flags   uint8
//	n       uint32, a question, or the versions in a hello
//	id      [8]byte, of a socket, or of a process in a hello
//	dev     uint64, and
//	ino     uint64: the file of a unix socket
//	port    uint16
//	space   uint64, a network namespace
//	device  int32, the index of an interface
//	network, sub, host: strings of up to 255 bytes, each after its length in a byte
//
// in big endian. What follows in the length is ignored, and so is a frame of a kind
// that isn't known: that is room for later versions. A process speaks the last two
// versions, because a handoff matters most during an upgrade; so far there is one.

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The versions of the protocol that are spoken.
const handoffLowest, handoffHighest = 1, 1

const (
	frameHello   = iota + 1 // who I am; the first frame of both
	frameOn                 // I listen on the address
	frameOff                // n: I don't any more. OK if the other serves or keeps its sockets
	frameHas                // n: I hold the socket. The other wants it, or answers
	frameWant               // n: send me the socket
	frameSocket             // n: the socket, with a descriptor. The other answers
	frameDrop               // I don't hold the socket any more
	frameBound              // the socket listens, on this address, with this file
	frameClaim              // n: I want to accept from the socket. OK if the other knows nobody who does
	frameRelease            // I don't accept from the socket any more
	frameKeeper             // I keep sockets when nobody is left on their address, or not any more
	frameAsk                // n: are you there?
	frameTell               // tell me all that you hold
	frameSynced             // that is all
	frameAnswer             // n, of a question; of a socket, if it is named: I hold it, or I don't
)

const (
	flagOK       = 1 << iota // in an answer; in a hello: this link is to be used
	flagBalanced             // the socket is one of the kernel's group
	flagMine                 // the sender accepts from the socket
	flagLeft                 // the sender knows that its last owner is gone
	flagBound                // it listens
	flagKeeper               // the sender is a keeper
	flagSettled              // its first Listen has joined the handoff
	flagObserver             // it only looks
)

// helloName is in the network field of a hello.
const helloName = "lblisten"

// An id is a random name, of a process or a socket.
type id [8]byte

func newID() (x id) {
	rand.Read(x[:]) // never fails: from Go 1.24 it says so, before that it is /dev/urandom
	return x
}

// String is the name of a process's file.
func (x id) String() string { return hex.EncodeToString(x[:]) }

func parseID(name string) (x id, ok bool) {
	b, err := hex.DecodeString(name)
	if err != nil || len(b) != len(x) || hex.EncodeToString(b) != name {
		return x, false
	}
	return id(b), true
}

func (x id) less(y id) bool { return string(x[:]) < string(y[:]) }

type frame struct {
	kind, flags byte
	n           uint32
	id          id
	file        fileKey
	at          place  // the address
	sub         string // the network of the socket, where a member has two
}

const (
	frameFixed = 1 + 1 + 4 + 8 + 8 + 8 + 2 + 8 + 4
	frameMost  = 2 + frameFixed + 3*(1+255)
)

var errFrame = errors.New("a message that makes no sense")

// append appends the encoded frame to b.
func (f *frame) append(b []byte) []byte {
	begin := len(b)
	b = append(b, 0, 0, f.kind, f.flags)
	b = binary.BigEndian.AppendUint32(b, f.n)
	b = append(b, f.id[:]...)
	b = binary.BigEndian.AppendUint64(b, f.file.dev)
	b = binary.BigEndian.AppendUint64(b, f.file.ino)
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
	if length < frameFixed+3 || length > 2*frameMost {
		return f, 0, errFrame
	}
	if len(b) < 2+length {
		return f, 0, nil
	}
	b = b[2 : 2+length]
	f.kind, f.flags, f.n, f.id = b[0], b[1], binary.BigEndian.Uint32(b[2:]), id(b[6:14])
	f.file = fileKey{binary.BigEndian.Uint64(b[14:]), binary.BigEndian.Uint64(b[22:])}
	f.at.port = int(binary.BigEndian.Uint16(b[30:]))
	f.at.space = binary.BigEndian.Uint64(b[32:])
	f.at.device = int(int32(binary.BigEndian.Uint32(b[40:])))
	b = b[frameFixed:]
	for _, s := range []*string{&f.at.network, &f.sub, &f.at.host} {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return f, 0, errFrame
		}
		n := 1 + int(b[0])
		*s, b = string(b[1:n]), b[n:]
	}
	return f, 2 + length, nil
}

// A parcel is a frame on its way, with its descriptor, if it has one.
type parcel struct {
	frame
	d *descriptor
}

// messageDescriptors is the most descriptors that one message may bring. The package
// sends one.
const messageDescriptors = 64

// A frameReader takes frames off a connection.
type frameReader struct {
	c   *net.UnixConn
	buf [4 * frameMost]byte
	oob [512]byte     // room for messageDescriptors
	in  []byte        // of buf, not decoded yet
	fds []*descriptor // that no frame has taken yet; nil for one that was cut off
}

// next returns the next frame, and its descriptor if it brings one: nil if the
// descriptor was cut off, because this process may have no more.
func (r *frameReader) next() (p parcel, err error) {
	for {
		f, n, err := decodeFrame(r.in)
		if err != nil {
			return p, err
		}
		if n > 0 {
			r.in = r.in[n:]
			p.frame = f
			if f.kind == frameSocket {
				if len(r.fds) == 0 {
					return p, fmt.Errorf("%w: it is to bring a descriptor and doesn't", errFrame)
				}
				p.d = r.fds[0]
				r.fds = r.fds[1:]
			}
			return p, nil
		}
		if err := r.fill(); err != nil {
			return p, err
		}
	}
}

// hasMore tells whether next returns without waiting.
func (r *frameReader) hasMore() bool {
	_, n, err := decodeFrame(r.in)
	return n > 0 || err != nil
}

// fill reads more.
func (r *frameReader) fill() error {
	begun := copy(r.buf[:], r.in)
	r.in = r.buf[:begun]
	n, oobn, flags, _, err := r.c.ReadMsgUnix(r.buf[begun:], r.oob[:unix.CmsgSpace(4*messageDescriptors)])
	if oobn > 0 {
		if err := r.take(r.oob[:oobn]); err != nil {
			return err
		}
	}
	switch {
	case err != nil:
		return err
	case n == 0:
		return net.ErrClosed
	case flags&unix.MSG_CTRUNC != 0:
		r.fds = append(r.fds, nil)
	}
	if len(r.fds) > messageDescriptors {
		return fmt.Errorf("%w: descriptors that belong to nothing", errFrame)
	}
	r.in = r.buf[:begun+n]
	return nil
}

// take takes descriptors out of control messages.
func (r *frameReader) take(oob []byte) error {
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
		for _, fd := range fds {
			r.fds = append(r.fds, newDescriptor(fd))
		}
	}
	return nil
}

// drain closes the descriptors that came without a frame.
func (r *frameReader) drain() {
	for _, d := range r.fds {
		d.release()
	}
	r.fds = nil
}

// writeParcels writes frames, as many as go together in one message.
func writeParcels(c *net.UnixConn, queue []parcel) error {
	var b []byte
	for i, p := range queue {
		b = p.append(b)
		if i+1 < len(queue) && p.d == nil && len(b) < 4*frameMost {
			continue
		}
		var rights []byte
		if p.d != nil {
			rights = unix.UnixRights(p.d.fd)
		}
		n, _, err := c.WriteMsgUnix(b, rights, nil)
		for errors.Is(err, unix.ETOOMANYREFS) || errors.Is(err, unix.ENOBUFS) { // too many on their way, of all this user's processes
			time.Sleep(retryAfter / 10)
			n, _, err = c.WriteMsgUnix(b, rights, nil)
		}
		if err == nil && n < len(b) {
			_, err = c.Write(b[n:])
		}
		if err != nil {
			return err
		}
		b = b[:0]
	}
	return nil
}
