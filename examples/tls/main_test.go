//go:build unix

package main

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/lblisten/lblisten/internal/joining"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

var insecure = tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}

func transport() *http.Transport {
	return &http.Transport{TLSClientConfig: insecure.Clone(), ForceAttemptHTTP2: true}
}

// Two processes are replaced, one after the other, under load. No request fails,
// and all are HTTP/2.
func TestRestartUnderLoad(t *testing.T) {
	if runtime.GOOS == "aix" {
		t.Skip("no WithHandoff on AIX")
	}
	path := filepath.Join(exampletest.Dir(t), "handoff")
	p := exampletest.Start(t, "-addr", "127.0.0.1:0", "-handoff", path)
	url := p.Hear("ready on ")
	load := exampletest.StartLoad(t, 8, url, transport)
	load.Await(50)
	for range 3 {
		next := exampletest.Start(t, "-addr", strings.TrimPrefix(url, "https://"), "-handoff", path)
		next.Hear("ready on ")
		load.Await(50)
		p.Stop(syscall.SIGTERM)
		p = next
	}
	load.Await(50)
	answered, by, failed := load.End()
	t.Logf("%d requests answered, %d failed, by %v", answered, len(failed), by)
	failed = slices.DeleteFunc(failed, joining.TurnedAway)
	require.Empty(t, failed)
	require.Len(t, by, 4)
	for who := range by {
		require.Contains(t, who, "HTTP/2.0")
	}
	p.Stop(syscall.SIGTERM)
}

// A client that comes back resumes its session, whichever accept loop it meets.
func TestSessionsResume(t *testing.T) {
	p := exampletest.Start(t, "-addr", "127.0.0.1:0")
	addr := strings.TrimPrefix(p.Hear("ready on "), "https://")
	config := insecure.Clone()
	config.NextProtos = []string{"http/1.1"}
	config.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	for i := range 20 {
		c, err := (&tls.Dialer{NetDialer: &net.Dialer{Timeout: exampletest.Limit(20e9)}, Config: config}).Dial("tcp", addr)
		require.NoError(t, err)
		_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		require.NoError(t, err)
		_, err = io.ReadAll(c) // the ticket comes after the handshake
		require.NoError(t, err)
		require.Equal(t, i > 0, c.(*tls.Conn).ConnectionState().DidResume, "connection %d", i)
		c.Close()
	}
	p.Stop(syscall.SIGTERM)
}
