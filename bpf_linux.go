package lblisten

// BPF: the programs that this package loads, as tables of instructions, and
// bpf(2) itself. It knows nothing of listeners.

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// insn is an instruction of eBPF: struct bpf_insn in linux/bpf.h.
type insn struct {
	op       uint8
	dst, src uint8 // registers
	off      int16
	imm      int32
}

const (
	opLoad64 = unix.BPF_LDX | unix.BPF_MEM | 0x18 // BPF_DW: dst = *(u64 *)(src + off)
	opMov    = 0x07 | 0xb0                        // BPF_ALU64 | BPF_MOV | BPF_K: dst = imm
	opExit   = unix.BPF_JMP | 0x90                // BPF_EXIT: return r0

	skPass = 1
	// reuseportMigratingSK is the offset of migrating_sk in struct
	// sk_reuseport_md: the socket that is closing, or null for a new connection.
	reuseportMigratingSK = 48
)

// migrateProgram lets the kernel's hash choose, and being one that may migrate
// (BPF_SK_REUSEPORT_SELECT_OR_MIGRATE) makes the kernel give the queue of a
// socket that closes to the rest of its group.
var migrateProgram = []insn{
	{op: opLoad64, dst: 2, src: 1, off: reuseportMigratingSK}, // fails to load before Linux 5.14, which can't migrate
	{op: opMov, dst: 0, imm: skPass},                          // nothing selected: by the kernel's hash
	{op: opExit},
}

// license is that of the programs, for the kernel.
var license = []byte("MIT\x00")

// bytes is the form that the kernel reads.
func (i insn) bytes() [8]byte {
	var b [8]byte
	b[0] = i.op
	b[1] = i.src<<4 | i.dst
	if cpu.IsBigEndian {
		b[1] = i.dst<<4 | i.src
	}
	*(*int16)(unsafe.Pointer(&b[2])) = i.off
	*(*int32)(unsafe.Pointer(&b[4])) = i.imm
	return b
}

// bpf is bpf(2). Tests put what other kernels say in its place.
var bpf = func(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}

// loadProgram loads a program of the type that chooses a socket of a group, and
// returns its descriptor. It needs CAP_BPF.
func loadProgram(program []insn) (int, error) {
	code := make([][8]byte, len(program))
	for i, in := range program {
		code[i] = in.bytes()
	}
	attr := struct {
		progType, insnCount uint32
		insns, license      uint64
		logLevel, logSize   uint32
		logBuf              uint64
		kernVersion, flags  uint32
		name                [16]byte
		ifindex, attachType uint32
	}{
		progType:   unix.BPF_PROG_TYPE_SK_REUSEPORT,
		insnCount:  uint32(len(code)),
		insns:      uint64(uintptr(unsafe.Pointer(&code[0]))),
		license:    uint64(uintptr(unsafe.Pointer(&license[0]))),
		attachType: unix.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
	}
	copy(attr.name[:], "lblisten")
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(code)
	return fd, err
}

// openPinned opens a program that was pinned in a BPF file system. It needs no
// more than the permission to read and write the file.
func openPinned(path string) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := struct {
		path      uint64
		fd, flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, err := bpf(unix.BPF_OBJ_GET, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(name)
	return fd, err
}

// attachProgram puts a program in force for the group of a listening socket, in
// the place of any other. It needs no privilege.
func attachProgram(socket, program int) error {
	return unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, program)
}

// migration is the migrating program of this process. It is loaded once and
// shared by all groups; the last one closes it.
var migration struct {
	mu    sync.Mutex
	users int
	fd    int   // of the program, while there are users
	never error // this kernel can't load it, and never will
}

// useMigration attaches the migrating program to the group of a listening
// socket. What it holds is given back by dropMigration.
func useMigration(socket int) error {
	m := &migration
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.never != nil {
		return m.never
	}
	if m.users == 0 {
		fd, err := loadProgram(migrateProgram)
		switch {
		case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EACCES):
			// Not known to this kernel; a filter of system calls can't be taken off either.
			m.never = fmt.Errorf("loading the program that lets the kernel inherit: %w; it takes Linux 5.14 with bpf(2)", err)
			return m.never
		case err != nil: // privileges come and go
			return fmt.Errorf("loading the program that lets the kernel inherit: %w; give the process CAP_BPF or set %s=1", err, migrateSysctl)
		}
		m.fd = fd
	}
	if err := attachProgram(socket, m.fd); err != nil {
		if m.users == 0 {
			unix.Close(m.fd)
		}
		return fmt.Errorf("attaching the program that lets the kernel inherit: %w", err)
	}
	m.users++
	return nil
}

func dropMigration() {
	m := &migration
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users == 0 {
		unix.Close(m.fd)
	}
}

// usePinned attaches a pinned program to the group of a listening socket.
func usePinned(socket int, path string) error {
	fd, err := openPinned(path)
	if err != nil {
		return fmt.Errorf("WithPinnedProgram: %w", &os.PathError{Op: "bpf_obj_get", Path: path, Err: err})
	}
	defer unix.Close(fd)
	if err := attachProgram(socket, fd); err != nil {
		return fmt.Errorf("WithPinnedProgram: attaching %s: %w", path, err)
	}
	return nil
}
