package child

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// CanFreeze tells whether this system tells what a process has accepted.
const CanFreeze = true

// stopTime is how long a process may take to stop.
const stopTime = 10 * time.Second

// DieWithParent is for the moments in which a child is stopped, and can't see that
// its standard input has ended. The parent is, to the kernel, the thread that
// started it: start children by a goroutine that is locked to its thread.
var DieWithParent = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

// Freeze stops a process and returns the client ports of the connections to addr,
// a literal IPv4 address and port, that it has accepted, some of them twice.
func Freeze(pid int, addr string) (ports []int, err error) {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return nil, os.NewSyscallError("kill", err)
	}
	// The kernel reports the stop when the last thread has stopped.
	for deadline := time.Now().Add(stopTime); ; time.Sleep(time.Millisecond) {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOHANG, nil)
		switch {
		case err != nil && err != unix.EINTR:
			return nil, os.NewSyscallError("waitid", err)
		case err == nil && info.Signo != 0:
			// The list of a table that changes meanwhile can miss a line. What a
			// stopped process holds doesn't change, so twice is enough.
			for range 2 {
				more, err := accepted(pid, addr)
				if err != nil {
					return nil, err
				}
				ports = append(ports, more...)
			}
			return ports, nil
		case time.Now().After(deadline):
			return nil, fmt.Errorf("process %d does not stop", pid)
		}
	}
}

// accepted reads from /proc which connections to addr the process holds. A
// connection that waits in a queue has inode 0, and no process holds it.
func accepted(pid int, addr string) (ports []int, err error) {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(fds)
	if err != nil {
		return nil, err
	}
	inodes := make(map[string]bool)
	for _, f := range files {
		if link, err := os.Readlink(filepath.Join(fds, f.Name())); err == nil {
			if inode, ok := strings.CutPrefix(link, "socket:["); ok {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return nil, err
	}
	const local, remote, state, inode, listening = 1, 2, 3, 9, "0A"
	for _, line := range strings.Split(string(table), "\n") {
		f := strings.Fields(line)
		if len(f) <= inode || f[state] == listening || !inodes[f[inode]] || hexPort(f[local]) != int(at.Port()) {
			continue
		}
		ports = append(ports, hexPort(f[remote]))
	}
	return ports, nil
}

// hexPort returns the port of an address like 0100007F:1F90.
func hexPort(addr string) int {
	_, hex, _ := strings.Cut(addr, ":")
	port, _ := strconv.ParseUint(hex, 16, 16)
	return int(port)
}
