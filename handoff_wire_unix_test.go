//go:build unix && !aix

package lblisten

// Frames.

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Frames of kinds that this version doesn't know, and longer ones, are passed
// over.
func TestHandoffLaterFrames(t *testing.T) {
	later := frame{kind: 200, n: 7, at: place{network: "tcp", host: "::1", port: 80}}
	b := later.append(nil)
	b = append(b, "more to come"...)
	b[0], b[1] = byte((len(b)-2)>>8), byte(len(b)-2)
	b = (&frame{kind: frameAsk}).append(b)
	f, n, err := decodeFrame(b)
	require.NoError(t, err)
	require.Equal(t, later, f)
	f, _, err = decodeFrame(b[n:])
	require.NoError(t, err)
	require.EqualValues(t, frameAsk, f.kind)
}

// FuzzFrame feeds the decoder: it never takes more than there is, and what it
// makes of bytes encodes to what it decodes again.
func FuzzFrame(f *testing.F) {
	f.Add((&frame{kind: frameSocket, flags: 3, n: 9, id: newID(), file: fileKey{1, 2}, at: place{network: "tcp", host: "::", port: 8080}, sub: "tcp6"}).append(nil))
	f.Add([]byte{0, 45})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			got, n, err := decodeFrame(b)
			if err != nil || n == 0 {
				return
			}
			if n > len(b) {
				t.Fatalf("took %d of %d bytes", n, len(b))
			}
			again, m, err := decodeFrame(got.append(nil))
			if err != nil || again != got || m > n {
				t.Fatalf("%+v became %+v (%v)", got, again, err)
			}
			b = b[n:]
		}
	})
}
