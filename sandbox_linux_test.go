package lblisten

// Where workers and tests of Linux run: as another user, with other capabilities, in
// namespaces of their own, with a filter of system calls. The machine is left alone.

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// sandbox is where a worker runs: as whom, in which network.
type sandbox struct {
	name     string
	uid      int       // 0: root with all capabilities
	caps     []uintptr // of uid, if that isn't 0
	userns   bool      // root of a user namespace of its own
	sysctl   bool      // net.ipv4.tcp_migrate_req=1
	filtered string    // what a seccomp filter makes bpf(2) fail with
	pinned   string
	// what is to be seen
	kernel bool   // the kernel inherits
	reason string // part of Info.Reason
}

// run runs a worker in the sandbox, with a loopback interface of its own, and
// decodes what it prints.
func (s sandbox) run(t *testing.T, worker string, v any, env ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making a network namespace takes root")
	}
	cmd := exec.Command(executable(t))
	config, err := json.Marshal(map[string]any{"worker": worker, "uid": s.uid, "caps": s.caps, "sysctl": s.sysctl, "userns": s.userns})
	require.NoError(t, err)
	cmd.Env = append(append(os.Environ(), "LBLISTEN_TEST_WORKER=network", "LBLISTEN_TEST_SANDBOX="+string(config),
		"LBLISTEN_TEST_FILTER="+s.filtered, "GORACE=atexit_sleep_ms=0", "LBLISTEN_TEST_PINNED="+s.pinned), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, json.Unmarshal(out, v), "%s", out)
}

func check(err error) {
	if err != nil {
		_, file, line, _ := runtime.Caller(1)
		panic(fmt.Sprintf("%s:%d: %v", filepath.Base(file), line, err))
	}
}

// networkWorker prepares its network namespace and runs the worker proper.
func networkWorker() {
	var s struct {
		Worker         string
		UID            int
		Caps           []uintptr
		Sysctl, Userns bool
	}
	check(json.Unmarshal([]byte(os.Getenv("LBLISTEN_TEST_SANDBOX")), &s))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	check(err)
	ifr, err := unix.NewIfreq("lo")
	check(err)
	ifr.SetUint16(unix.IFF_UP)
	check(unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
	unix.Close(fd)
	// Addresses of its own for IPv6 clients, which have no 127.0.0.0/8.
	if ip, err := exec.LookPath("ip"); err == nil {
		check(exec.Command(ip, "-6", "route", "add", "local", "fd00::/16", "dev", "lo").Run())
		check(os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0))
	}
	if s.Sysctl {
		check(os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte("1"), 0))
	}
	self, err := os.Executable()
	check(err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LBLISTEN_TEST_WORKER="+s.Worker)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// The parent's death is that of its first thread here, not of any.
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if s.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.UID)}
		cmd.SysProcAttr.AmbientCaps = s.Caps
	}
	if s.Userns {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	}
	check(cmd.Run())
}

// inNamespaces runs the test alone, in namespaces of its own, and returns true there.
// The kernel's migration is forbidden there, because it would hide what is lost.
func inNamespaces(t *testing.T, flags uintptr) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making namespaces takes root")
	}
	if !rerun(t, &syscall.SysProcAttr{Cloneflags: flags}) {
		return false
	}
	filterBPF("EPERM")
	if flags&unix.CLONE_NEWNS != 0 {
		require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	}
	if flags&unix.CLONE_NEWNET != 0 {
		setAddress(t, "lo", nil, unix.IFF_UP)
	}
	return true
}

// setAddress gives an interface an address, and flags: an alias without IFF_UP is
// taken away.
func setAddress(t *testing.T, name string, ip net.IP, flags uint16) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	require.NoError(t, err)
	if ip != nil {
		require.NoError(t, ifr.SetInet4Addr(ip.To4()))
		require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFADDR, ifr))
	}
	if ip == nil {
		ifr.SetUint16(flags)
		require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
	}
}

// filterCall has a seccomp filter do what ret says when a system call is made,
// with arg as its third argument if that isn't 0: in this thread, or by the flags
// in the whole process.
func filterCall(call uintptr, arg uint32, ret uint32, flags uintptr) (fd int) {
	low := uint32(16 + 2*8) // of struct seccomp_data
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		low += 4
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(call), Jf: 4},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: low},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: arg, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JA, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: ret},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if arg != 0 {
		filter[4].K = 1
	}
	check(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	r, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if e != 0 {
		check(e)
	}
	return int(r)
}

// filterBPF makes bpf(2) fail in this process from now on, as the filters of
// containers do.
func filterBPF(with string) {
	errno, ok := map[string]uint32{"EPERM": uint32(unix.EPERM), "ENOSYS": uint32(unix.ENOSYS)}[with]
	if !ok {
		return
	}
	check(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | errno},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if e != 0 {
		check(e)
	}
}

// needSocketCalls skips where sockets have one system call for everything.
func needSocketCalls(t *testing.T) {
	t.Helper()
	if runtime.GOARCH == "386" || runtime.GOARCH == "s390x" {
		t.Skipf("on %s all goes by socketcall(2), and a filter can't tell", runtime.GOARCH)
	}
}

// needSeccompAction skips where a filter can't do that with a system call. Before Linux
// 4.14, and in gVisor, the kernel can't be asked.
func needSeccompAction(t *testing.T, action uint32) {
	t.Helper()
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action))); e != 0 {
		t.Skipf("the kernel has no action %#x of seccomp(2): %v", action, e)
	}
}

// needPrograms skips where the kernel has no reuseport programs.
func needPrograms(t testing.TB) {
	t.Helper()
	if none := noPrograms(); none != nil {
		t.Skip(none)
	}
}

// needBPF skips where the machine itself has no bpf(2), or no program of ours.
func needBPF(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading a program, and making a network namespace, take root")
	}
	fd, err := loadProgram(migrateProgram)
	if err != nil {
		t.Skipf("this kernel or container has no migrating programs: %v", err)
	}
	unix.Close(fd)
}

// pin pins the migrating program where any user can use it, and returns the path.
func pin(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lbpf")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		t.Skipf("no BPF file system: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	fd, err := loadProgram(migrateProgram)
	require.NoError(t, err)
	defer unix.Close(fd)
	path := filepath.Join(dir, "migrate")
	name, err := unix.BytePtrFromString(path)
	require.NoError(t, err)
	attr := struct {
		path      uint64
		fd, flags uint32
		keep      *byte
	}{path: heap(name), fd: uint32(fd), keep: name}
	_, err = bpf(unix.BPF_OBJ_PIN, unsafe.Pointer(&attr), unsafe.Offsetof(attr.keep))
	require.NoError(t, err)
	require.NoError(t, os.Chmod(path, 0o666))
	return path
}

// onDescriptor runs f on the descriptor of a member's socket.
func onDescriptor(l *Listener, f func(fd int) error) error {
	c, err := l.SyscallConn()
	if err != nil {
		return err
	}
	return onFD(c, func(fd uintptr) error { return f(int(fd)) })
}
