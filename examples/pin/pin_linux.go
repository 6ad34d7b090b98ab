package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// The program, as the kernel reads it. It chooses nothing, which leaves new
// connections to the kernel's hash, and is of the kind that migrates.
var program = [3][8]byte{
	{0x79, 0x12, 48},      // r2 = ctx->migrating_sk: fails to load where the kernel can't migrate (before 5.14)
	{0xb7, 0x00, 0, 0, 1}, // r0 = SK_PASS
	{0x95},                // exit
}

var license = []byte("MIT\x00")

func pin(path string) error {
	if cpu.IsBigEndian {
		program[0] = [8]byte{0x79, 0x21, 0, 48}
		program[1] = [8]byte{0xb7, 0, 0, 0, 0, 0, 0, 1}
	}
	load := &struct {
		progType, insnCount uint32
		insns, license      uint64
		_                   [24]byte // no log, no version, no flags
		name                [16]byte
		_, attachType       uint32
	}{
		progType:   unix.BPF_PROG_TYPE_SK_REUSEPORT,
		insnCount:  uint32(len(program)),
		insns:      uint64(uintptr(unsafe.Pointer(&program))), // globals don't move
		license:    uint64(uintptr(unsafe.Pointer(&license[0]))),
		attachType: unix.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
	}
	copy(load.name[:], "lblisten")
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(load)), unsafe.Sizeof(*load))
	if errno != 0 {
		return os.NewSyscallError("bpf BPF_PROG_LOAD", errno)
	}
	defer unix.Close(int(fd))

	name = append([]byte(path), 0)
	obj := &struct {
		path      uint64
		fd, flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(&name[0]))), fd: uint32(fd)}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_PIN, uintptr(unsafe.Pointer(obj)), unsafe.Sizeof(*obj)); errno != 0 {
		err := error(errno)
		if errno == unix.EPERM || errno == unix.ENOENT {
			err = fmt.Errorf("%w; is it in a BPF file system? (mount -t bpf bpf /sys/fs/bpf)", err)
		}
		return &os.PathError{Op: "bpf_obj_pin", Path: path, Err: err}
	}
	// Who uses it has to open it for reading and writing, which lets nobody change
	// the program. Another one in its place takes the right to write to the directory.
	return os.Chmod(path, 0o666)
}

// name is the path for the kernel, global so that it is on the heap.
var name []byte
