package lblisten

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Groups begin and end to be looked after from many goroutines, so that the one
// that looks ends and starts again all the time; and a group that stays is looked
// after meanwhile. Nothing is left in the end.
func TestKeepLooking(t *testing.T) {
	noLeaks(t)
	idle := func() bool { return lookedAfter() == 0 }
	require.True(t, idle())
	churn := func(goroutines int, goOn func() bool) (n int64) {
		var wg sync.WaitGroup
		var starts atomic.Int64
		for i := range goroutines {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for goOn() {
					stop := everySecond(func() {})
					if starts.Add(1)%int64(i+2) == 0 {
						time.Sleep(50 * time.Microsecond)
					}
					stop()
				}
			}()
		}
		wg.Wait()
		return starts.Load()
	}
	until := time.Now().Add(limit(300 * time.Millisecond))
	n := churn(1, func() bool { return time.Now().Before(until) }) // each is the first and the last
	until = time.Now().Add(limit(300 * time.Millisecond))
	n += churn(4, func() bool { return time.Now().Before(until) })
	require.True(t, idle())

	var looks atomic.Int64
	stop := everySecond(func() { looks.Add(1) })
	late := time.Now().Add(limit(20 * time.Second))
	n += churn(4, func() bool { return looks.Load() < 2 && time.Now().Before(late) })
	require.GreaterOrEqual(t, looks.Load(), int64(2), "it isn't looked after")
	stop()
	require.True(t, idle())
	t.Logf("%d began and ended", n)
}

// Another user's process can't join the group of an address, specific or not.
func TestOtherUsersCannotJoin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("being two users takes root")
	}
	noLeaks(t)
	self := executable(t)
	for _, address := range []string{"127.0.0.1:0", ":0"} {
		ln, err := Listen("tcp", address, WithRequireKernel())
		require.NoError(t, err)
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER=joinThere", "LBLISTEN_TEST_ADDRESS="+ln.Addr().String(), "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, "address in use", strings.TrimSpace(string(out)))
		require.NoError(t, ln.Close())
	}
}

func joinThereWorker() {
	ln, err := Listen("tcp", os.Getenv("LBLISTEN_TEST_ADDRESS"), WithLB())
	switch {
	case err == nil:
		os.Stdout.WriteString("it joined " + ln.Addr().String())
	case isAddrInUse(err):
		os.Stdout.WriteString("address in use")
	default:
		os.Stdout.WriteString(err.Error())
	}
}
