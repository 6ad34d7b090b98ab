//go:build unix && !aix

package lblisten

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func init() {
	accepted = append(accepted,
		opening{"socket of another process, kernel", received(false)},
		opening{"socket of another process, dispatcher", received(true)})
}

// received opens a listener on sockets that another process has made, which is
// gone. With the kernel its own socket is one of nine.
func received(dispatcher bool) func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
	return func(t *testing.T) (net.Addr, func() (net.Conn, error)) {
		opt := modes[1].opt
		if !dispatcher {
			modes[0].need(t)
			opt = modes[0].opt
		}
		path := socketPath(t)
		s := startServer(t, serverJob{Path: path, Address: "127.0.0.1:0", Members: 8, Dispatcher: dispatcher})
		_, ls := newTestGroup(t, 1, "tcp", s.Address, opt, WithHandoff(path))
		s.becomes(isHandedOff)
		s.kill()
		if !dispatcher {
			require.Eventually(t, func() bool { return ls[0].Info().Sockets == 9 }, limit(5*time.Second), time.Millisecond)
		}
		return ls[0].Addr(), ls[0].Accept
	}
}
