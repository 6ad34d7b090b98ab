// guest is the first process of a kernel that .ci/kernels boots: it runs the tests as root
// and as an ordinary user, with the arguments of /arguments, and switches the machine off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Println("guest is for .ci/kernels")
		os.Exit(2)
	}
	defer unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	for _, fs := range []string{"proc /proc", "sysfs /sys", "devtmpfs /dev", "tmpfs /tmp", "tmpfs /run"} {
		kind, dir, _ := strings.Cut(fs, " ")
		os.MkdirAll(dir, 0o755)
		must(unix.Mount(kind, dir, kind, 0, ""))
	}
	must(os.Chmod("/tmp", 0o1777))
	must(os.MkdirAll("/etc", 0o755))
	must(os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n::1 localhost\n"), 0o644))
	must(os.WriteFile("/etc/passwd", []byte("root:x:0:0::/tmp:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n"), 0o644))
	modules, _ := filepath.Glob("/modules/*")
	for range 2 { // one may need another
		for _, m := range modules {
			f, err := os.Open(m)
			must(err)
			unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
	}
	loopback()
	version, _ := os.ReadFile("/proc/version")
	_, err := os.Stat("/proc/sys/net/ipv4/tcp_migrate_req")
	fmt.Printf("guest: %s, tcp_migrate_req: %v\n", strings.TrimSpace(string(version)), err == nil)
	arguments, err := os.ReadFile("/arguments")
	must(err)
	environment, err := os.ReadFile("/environment")
	must(err)
	for _, uid := range []uint32{0, 65534} {
		fmt.Printf("\nguest: as uid %d\n", uid)
		cmd := exec.Command("/lblisten.test", strings.Fields(string(arguments))...)
		cmd.Env = append(strings.Fields(string(environment)), "TMPDIR=/tmp", "HOME=/tmp", "PATH=/bin")
		cmd.Dir = "/tmp"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		begin := time.Now()
		err := cmd.Run()
		fmt.Printf("\nguest: uid %d, %.0f s: %v\n", uid, time.Since(begin).Seconds(), map[bool]any{true: "ok", false: err}[err == nil])
		for { // what tests have left
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// loopback switches it on.
func loopback() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(err)
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	must(err)
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	must(unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r))
}

func must(err error) {
	if err != nil {
		fmt.Println("guest:", err)
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}
