//go:build unix

package main

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { exampletest.Main(m, main) }

// Each answer names a listener of the process, which ends at SIGTERM without an
// error.
func TestAnswers(t *testing.T) {
	p := exampletest.Start(t, "-addr", "127.0.0.1:0", "-n", "3")
	addr, _, _ := strings.Cut(p.Hear("http://"), ": ")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range 20 {
		body, err := exampletest.Get(client, "http://"+addr)
		require.NoError(t, err)
		var listener, pid int
		_, err = fmt.Sscanf(body, "hello from listener %d of process %d", &listener, &pid)
		require.NoError(t, err, body)
		require.Contains(t, []int{0, 1, 2}, listener)
		require.Equal(t, p.Pid(), pid)
	}
	p.Stop(syscall.SIGTERM)
}
