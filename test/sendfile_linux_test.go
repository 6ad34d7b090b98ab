package test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	bodySize = 1 << 20
	sniffed  = 512 // what net/http writes itself, before it leaves the rest to the connection
)

// A file goes out by sendfile, and what a handler copies from another
// connection by splice, as with net.Listen. strace counts the bytes.
func TestSendfileAndSplice(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	if out, err := exec.Command(strace, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace does not run here: %s", out)
	}
	self, err := os.Executable()
	require.NoError(t, err)
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			noLeaks(t)
			trace := filepath.Join(t.TempDir(), "trace")
			cmd := exec.Command(strace, "-f", "-e", "trace=sendfile,splice", "-o", trace, self)
			cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=sendfile", "LBLISTEN_TEST_ROW="+r.name, "GORACE=atexit_sleep_ms=0")
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			text, err := os.ReadFile(trace)
			require.NoError(t, err)
			sent, spliced := tracedBytes(t, text, "sendfile"), tracedBytes(t, text, "splice")
			t.Logf("of two answers of %d bytes sendfile sent %d and splice, twice, %d", bodySize, sent, spliced)
			require.GreaterOrEqual(t, sent, bodySize-sniffed)
			require.GreaterOrEqual(t, spliced, 2*(bodySize-sniffed)) // into a pipe, and out of it
		})
	}
}

// tracedBytes is the sum of what a system call returned.
func tracedBytes(t *testing.T, trace []byte, call string) (n int) {
	for _, m := range regexp.MustCompile(`(?m)^\d+ +(?:<\.\.\. )?`+call+`\b.* = (\d+)$`).FindAllSubmatch(trace, -1) {
		i, err := strconv.Atoi(string(m[1]))
		require.NoError(t, err)
		n += i
	}
	return n
}

func init() { workers["sendfile"] = sendfileWorker }

// sendfileWorker serves a file and what it reads from another server, and gets
// both.
func sendfileWorker() {
	f, err := os.CreateTemp("", "lblisten")
	must(err)
	defer os.Remove(f.Name())
	must(f.Truncate(bodySize))

	up, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	go func() {
		c, err := up.Accept()
		must(err)
		_, err = c.Write(make([]byte, bodySize))
		must(err)
		c.Close()
	}()

	mux := http.NewServeMux()
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, f.Name()) })
	mux.HandleFunc("/proxied", func(w http.ResponseWriter, r *http.Request) {
		c, err := net.Dial("tcp", up.Addr().String())
		must(err)
		defer c.Close()
		w.Header().Set("Content-Length", strconv.Itoa(bodySize))
		_, err = io.Copy(w, c)
		must(err)
	})
	for _, r := range rows {
		if r.name != os.Getenv("LBLISTEN_TEST_ROW") {
			continue
		}
		g, err := r.open()
		must(err)
		srv := &http.Server{Handler: mux}
		served := g.start(srv.Serve)
		for _, path := range []string{"/file", "/proxied"} {
			resp, err := http.Get("http://" + g.addr() + path)
			must(err)
			n, err := io.Copy(io.Discard, resp.Body)
			must(err)
			if n != bodySize {
				panic(fmt.Sprintf("%s has %d bytes", path, n))
			}
			resp.Body.Close()
		}
		must(g.close())
		must(<-served)
	}
}

// must is for workers.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
