package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
)

// TestMain runs the program itself in the process that TestMetrics starts.
func TestMain(m *testing.M) {
	if os.Getenv("LBLISTEN_TEST_WORKER") == "metrics" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The program tells at /debug/vars what its listeners have accepted, and ends by
// an interrupt without an error.
func TestMetrics(t *testing.T) {
	const clients, listeners = 20, 3
	slow, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || slow < 1 {
		slow = 1
	}
	self, err := os.Executable()
	if err != nil {
		t.Skip(err)
	}
	cmd := exec.Command(self, "-addr", "127.0.0.1:0", "-n", strconv.Itoa(listeners))
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=metrics")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	err = cmd.Start()
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no processes here: ", err)
	}
	require.NoError(t, err)
	waited := false
	t.Cleanup(func() {
		if !waited {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	// Whatever goes wrong, the program ends, and so does the reading below.
	defer time.AfterFunc(time.Duration(slow*float64(30*time.Second)), func() { cmd.Process.Kill() }).Stop()

	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	url := regexp.MustCompile(`^http://(.*)/debug/vars\n$`).FindStringSubmatch(line)
	require.NotNil(t, url, line)

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // a connection for each request
	var all struct{ Lblisten map[string]any }
	var v vars
	for i := range clients {
		resp, err := client.Get(line[:len(line)-1])
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		var told struct{ Lblisten *vars }
		require.NoError(t, json.Unmarshal(body, &told))
		require.NotNil(t, told.Lblisten, "%s", body)
		v = *told.Lblisten
		require.EqualValues(t, i+1, v.Accepted, "%s", body)
		require.NoError(t, json.Unmarshal(body, &all))
	}
	require.Equal(t, url[1], v.Address)
	require.Equal(t, listeners, v.Members)
	require.Len(t, v.Listeners, listeners)
	var sum uint64
	for _, s := range v.Listeners {
		sum += s.Accepted
	}
	require.EqualValues(t, clients, sum)
	require.Contains(t, []string{lblisten.BalancerKernel.String(), lblisten.BalancerDispatcher.String()}, v.Balancer)
	require.Equal(t, "flow", v.Steering)
	require.Contains(t, v.OnClose, "process")
	for _, name := range []string{"Accepted", "Inherited", "Queued", "Backlog", "OnKill", "Sockets"} {
		require.Contains(t, all.Lblisten, name)
	}

	if runtime.GOOS == "windows" {
		return // it has no signals
	}
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	waited = true
	require.NoError(t, cmd.Wait())
}
