package lbprometheus

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// TestMain is also the second process of TestHandoff.
func TestMain(m *testing.M) {
	if address := os.Getenv("LBLISTEN_TEST_WORKER"); address != "" {
		if err := heir(address, os.Getenv("LBLISTEN_TEST_HANDOFF")); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// heir listens on address too, and says how long the queue is whenever it is asked.
func heir(address, path string) error {
	g, err := lblisten.ListenGroup(context.Background(), "tcp4", address, 1, lblisten.WithDispatcher(), lblisten.WithHandoff(path))
	if err != nil {
		return err
	}
	defer g.Close()
	fmt.Println("listening")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(g.Stats().Queued)
	}
	return nil
}

// on_kill says handoff as long as another process would inherit. Both tell the
// queue of the socket that they share.
func TestHandoff(t *testing.T) {
	noLeaks(t)
	dir, err := os.MkdirTemp("", "lb") // short, for a unix socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	g := open(t, 1, "tcp4", "127.0.0.1:0", lblisten.WithDispatcher(), lblisten.WithHandoff(path))
	scrape := register(t, g)
	told := func() (onKill string) {
		for name := range scrape() {
			if strings.HasPrefix(name, "listener_info") {
				require.Empty(t, onKill, "two at once")
				_, rest, _ := strings.Cut(name, `on_kill="`)
				onKill, _, _ = strings.Cut(rest, `"`)
			}
		}
		return onKill
	}
	becomes := func(want string) {
		t.Helper()
		require.Eventually(t, func() bool { return told() == want }, limit(20*time.Second), 10*time.Millisecond, "on_kill isn't %q", want)
	}
	require.Equal(t, "none", told())

	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER="+g.Addr().String(), "LBLISTEN_TEST_HANDOFF="+path)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	if err := cmd.Start(); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no processes here: ", err)
	} else {
		require.NoError(t, err)
	}
	killed := false
	kill := func() {
		if !killed {
			cmd.Process.Kill()
			cmd.Wait()
		}
		killed = true
	}
	t.Cleanup(kill)
	defer time.AfterFunc(limit(time.Minute), func() { cmd.Process.Kill() }).Stop() // ends the reading below
	said := bufio.NewReader(out)
	line, err := said.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "listening\n", line)
	becomes("handoff")

	const clients = 3
	dial(t, g.Addr(), clients)
	if g.Stats().Queued >= 0 {
		require.Eventually(t, func() bool { return scrape()[`queue_length{listener="shared"}`] == clients }, limit(10*time.Second), time.Millisecond)
		_, err = fmt.Fprintln(in)
		require.NoError(t, err)
		line, err = said.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintln(clients), line)
	}
	kill()
	becomes("none")
	accept(t, g.Listeners()[0], clients)
	require.EqualValues(t, clients, scrape()[`accepted_total{listener="0"}`])
}
