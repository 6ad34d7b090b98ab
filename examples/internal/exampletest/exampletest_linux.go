package exampletest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Unprivileged makes root's command run without a capability: with one, CAP_BPF, the
// kernel would inherit, and hide what is lost.
func Unprivileged(t testing.TB, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		return cmd
	}
	tool, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("root has the kernel's help, and there is no setpriv to do without (Debian: util-linux)")
	}
	return exec.Command(tool, append([]string{"--bounding-set=-all", "--inh-caps=-all"}, cmd.Args...)...)
}

// Freeze stops a process, and returns when every thread of it stands still, so that
// it accepts nothing more.
func Freeze(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(Limit(30 * time.Second)); !standsStill(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stand still", pid)
		}
	}
}

func standsStill(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, stat := range threads {
		b, err := os.ReadFile(stat)
		if err != nil || !strings.Contains(string(b), ") T ") {
			return false
		}
	}
	return len(threads) > 0
}
