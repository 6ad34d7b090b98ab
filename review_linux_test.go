package lblisten

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A pinned program would take the place of the one that steers, and Info would
// not know: a member that joins can't ask for it, as the first one can't.
func TestPinnedProgramDoesNotReplaceSteering(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	path := pin(t)
	for _, s := range []Steering{SteerSource, SteerLoad} {
		g, _ := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(s))
		_, err := Listen("tcp", g.Addr().String(), WithSteering(s), WithPinnedProgram(path))
		require.ErrorIs(t, err, ErrUnsupported)
		require.ErrorContains(t, err, "the address has one program")
		require.NoError(t, g.Close())
	}
}

// A pinned program that a later member brings stays in force: what steers closed
// members' sockets away would replace it, and then leave nothing.
func TestPinnedProgramOfALaterMemberStays(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	path := pin(t)
	g, ls := newTestGroup(t, 3, "tcp", "127.0.0.1:0", WithRequireKernel())
	require.NoError(t, ls[2].Close())
	g.g.k.tick()
	inForce := func() bool {
		g.g.mu.Lock()
		defer g.g.mu.Unlock()
		return !g.g.k.since.IsZero()
	}
	require.True(t, inForce(), "the socket of the closed member is steered away")
	later, err := Listen("tcp", g.Addr().String(), WithPinnedProgram(path)) // adopts it
	require.NoError(t, err)
	require.NoError(t, ls[1].Close())
	g.g.k.tick()
	require.False(t, inForce(), "a program has replaced the pinned one")
	require.NotZero(t, g.Info().OnKill&InheritKernel)
	require.NoError(t, later.Close())
}

// No descriptor of the package goes to a program that this one executes: neither
// listening sockets nor those of the handoff, of BPF and of looking again.
func TestDescriptorsAreClosedOnExec(t *testing.T) {
	noLeaks(t)
	before := openDescriptorsOf(t)
	path := handoffPath(t)
	g, _ := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithHandoff(path))
	d, _ := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithDispatcher())
	s, _ := newTestGroup(t, 2, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(SteerSource))
	n := 0
	for fd := range openDescriptorsOf(t) {
		if before[fd] {
			continue
		}
		n++
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == unix.EBADF {
			continue
		}
		require.NoError(t, err)
		require.NotZero(t, flags&unix.FD_CLOEXEC, "descriptor %d", fd)
	}
	require.GreaterOrEqual(t, n, 8)
	for _, g := range []*Group{g, d, s} {
		require.NoError(t, g.Close())
	}
}

func openDescriptorsOf(t *testing.T) map[int]bool {
	t.Helper()
	open := make(map[int]bool)
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open[fd] = true
		}
	}
	return open
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

func init() {
	workers["joinThere"] = func() {
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
}
