package lblisten

// Parts of tests, and tests, that run in processes of their own.

import (
	"flag"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// workers are parts of tests that run in processes of their own: this program,
// started again with the worker's name in the environment variable
// LBLISTEN_TEST_WORKER. What a worker needs to know is in other variables; it says
// what it has found by its output, and that something is wrong by a panic.
// workers_*_test.go have those of some systems only.
var workers = map[string]func(){
	"flowKey": flowKeyWorker, // prints the key of a flow
}

// alone has a test run in a process of its own, beside others, and returns true
// there. It is for tests that wait, and that measure or change what is all of the
// process's, for which they need a process to themselves.
func alone(t *testing.T) bool {
	t.Helper()
	if runtime.GOOS == "js" || runtime.GOOS == "wasip1" {
		return true // there are no processes
	}
	return rerun(t, nil)
}

// logLine is what t.Log prints.
var logLine = regexp.MustCompile(`^\w+_test\.go:\d+: `)

// rerun is alone, in a process with these attributes.
func rerun(t *testing.T, attr *syscall.SysProcAttr) bool {
	t.Helper()
	if os.Getenv("LBLISTEN_TEST_ALONE") == t.Name() {
		return true
	}
	beside(t)
	self, err := os.Executable()
	require.NoError(t, err)
	run := "^" + strings.Join(strings.Split(regexp.QuoteMeta(t.Name()), "/"), "$/^") + "$"
	if asked := strings.SplitN(flag.Lookup("test.run").Value.String(), "/", strings.Count(run, "/")+2); len(asked) == strings.Count(run, "/")+2 {
		run += "/" + asked[len(asked)-1] // of parts of it
	}
	cmd := exec.Command(self, "-test.v", "-test.run="+run, "-test.timeout="+limit(2*time.Minute).String())
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_ALONE="+t.Name(), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, line := range strings.Split(string(out), "\n") {
		switch what := strings.TrimSpace(line); {
		case strings.HasPrefix(what, "--- SKIP: "+t.Name()+" "):
			t.Skipf("%s", out)
		case logLine.MatchString(what):
			_, said, _ := strings.Cut(what, ": ")
			t.Log(said)
		}
	}
	require.Contains(t, string(out), "--- PASS: "+t.Name()+" ", "%s", out)
	return false
}
