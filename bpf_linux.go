package lblisten

// BPF: the programs that this package loads, as tables of instructions, and
// bpf(2) itself. It knows nothing of listeners.

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	cbpf "golang.org/x/net/bpf"
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

// mayUseBPF tells whether the process has the capability that bpf(2) takes for what
// this package loads: CAP_BPF, from Linux 5.8, or CAP_SYS_ADMIN. It is asked before,
// because a filter of system calls may kill a process that calls bpf(2): systemd's
// SystemCallFilter=@system-service does.
func mayUseBPF() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	has := func(c int) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	return has(unix.CAP_BPF) || has(unix.CAP_SYS_ADMIN)
}

// isNoBPF tells whether a program isn't loaded because this kernel doesn't know what it
// asks for, or has no bpf(2); a filter of system calls can't be taken off either.
func isNoBPF(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EACCES)
}

// whatMigrationTakes says what to do when no program that lets the kernel inherit can be
// loaded.
func whatMigrationTakes(err error) string {
	if isNoBPF(err) {
		return "it takes Linux 5.14, and bpf(2) or " + migrateSysctl + "=1"
	}
	return "give the process CAP_BPF or set " + migrateSysctl + "=1"
}

// errNoCapability is what bpf(2) would say.
var errNoCapability error = unix.EPERM

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

// heap is the address of something for the kernel. It must be on the heap, as it
// would move with a goroutine's stack: the callers put the pointer itself behind
// the attributes, which are on the heap because bpf is a variable.
func heap[T any](p *T) uint64 { return uint64(uintptr(unsafe.Pointer(p))) }

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
		keep                [][8]byte // not for the kernel: see heap
	}{
		progType:   unix.BPF_PROG_TYPE_SK_REUSEPORT,
		insnCount:  uint32(len(code)),
		insns:      heap(&code[0]),
		license:    heap(&license[0]),
		attachType: unix.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
		keep:       code,
	}
	copy(attr.name[:], "lblisten")
	for try := 1; ; try++ {
		fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Offsetof(attr.keep))
		if err != unix.EAGAIN || try == loadTries { // a signal came while the kernel verified it
			return fd, err
		}
	}
}

// loadTries is how often a program is loaded at the most.
const loadTries = 100

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
		keep      *byte
	}{path: heap(name), keep: name}
	return bpf(unix.BPF_OBJ_GET, unsafe.Pointer(&attr), unsafe.Offsetof(attr.keep))
}

// attachProgram puts a program in force for the group of a listening socket, in
// the place of any other. It needs no privilege.
func attachProgram(socket, program int) error {
	return unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, program)
}

// migration is the migrating program of this process. It is loaded once and
// shared by all addresses; the last one closes it.
var migration struct {
	mu    sync.Mutex // guards what follows, also over bpf(2), which doesn't wait for anybody; a leaf
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
		fd, err := -1, errNoCapability
		if mayUseBPF() {
			fd, err = loadProgram(migrateProgram)
		}
		switch {
		case isNoBPF(err):
			m.never = fmt.Errorf("loading the program that lets the kernel inherit: %w; %s", err, whatMigrationTakes(err))
			return m.never
		case err != nil: // privileges come and go
			return fmt.Errorf("loading the program that lets the kernel inherit: %w; %s", err, whatMigrationTakes(err))
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

// detachProgram takes the program off the group of a socket. It fails if there is
// none.
func detachProgram(fd uintptr) error {
	return os.NewSyscallError("setsockopt SO_DETACH_REUSEPORT_BPF",
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0))
}

// takeProgram takes off the program of a socket that is not bound yet, and tells whether
// there was one. It fails where no program can be had.
func takeProgram(fd uintptr) (was bool, none error) {
	if none = noPrograms(); none != nil {
		return false, none
	}
	return detachProgram(fd) == nil, nil
}

// noPrograms is why this kernel has no reuseport programs, nil if it has them. gVisor says
// yes to every option that it doesn't know, and so to programs: it is asked by one that
// there isn't, of which Linux knows that.
var noPrograms = sync.OnceValue(func() error {
	const nothing = 1 << 20
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, nothing, 1) != nil {
		return nil
	}
	return hint(ErrUnsupported, "the kernel says yes to reuseport programs and has none; WithDispatcher has source and load")
})

// attachClassic attaches the program that chooses by source between the places of the
// kernel's group.
func attachClassic(socket, places int) error {
	program, err := cbpf.Assemble(classicProgram(places))
	if err != nil {
		return fmt.Errorf("assembling a program for %d sockets: %w", places, err)
	}
	code := make([]unix.SockFilter, len(program))
	for i, in := range program {
		code[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_CBPF", unix.SetsockoptSockFprog(socket, unix.SOL_SOCKET,
		unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}))
}

// createMap makes a map with keys of four bytes.
func createMap(mapType, valueSize, entries, flags uint32) (int, error) {
	attr := struct{ mapType, keySize, valueSize, maxEntries, flags uint32 }{mapType, 4, valueSize, entries, flags}
	return bpf(unix.BPF_MAP_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// updateMap sets an element whose value has eight bytes.
func updateMap(fd int, key uint32, value uint64) error {
	attr := struct {
		fd, _             uint32
		key, value, flags uint64
		keep              struct {
			key   *uint32
			value *uint64
		}
	}{fd: uint32(fd), key: heap(&key), value: heap(&value)}
	attr.keep.key, attr.keep.value = &key, &value
	_, err := bpf(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&attr), unsafe.Offsetof(attr.keep))
	return err
}

// The state that the steering program reads: which of two tables is in use, the
// tables, and the length of each slot's queue. A table has, for every bucket of
// the hash, the slot of the socket that is first in rank, and in its other half
// that of the second.
const (
	tableSlots   = steeredMost // sockets
	tableBuckets = 1024
	tableSize    = 2 * 4 * tableBuckets
	stateTable   = 0
	stateTables  = 8
	stateLoads   = stateTables + 2*tableSize
	stateSize    = stateLoads + 4*tableSlots
)

// Registers, by the calling convention of eBPF.
const (
	r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, fp = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
)

// More of eBPF's instructions (Documentation/bpf/standardization/instruction-set.rst).
const (
	opLoad32    = unix.BPF_LDX | unix.BPF_MEM              // dst = *(u32 *)(src + off)
	opStore32   = unix.BPF_STX | unix.BPF_MEM              // *(u32 *)(dst + off) = src
	opLoadImm64 = unix.BPF_LD | unix.BPF_IMM | 0x18        // dst = what src says imm is; takes two instructions
	opMovReg    = 0x07 | 0xb0 | unix.BPF_X                 // dst = src
	opAddReg    = 0x07 | unix.BPF_ADD | unix.BPF_X         // dst += src
	opAdd       = 0x07 | unix.BPF_ADD                      // dst += imm
	opShl       = 0x07 | unix.BPF_LSH                      // dst <<= imm
	opAnd       = 0x07 | unix.BPF_AND                      // dst &= imm
	opMul32     = unix.BPF_ALU | unix.BPF_MUL              // (u32)dst *= imm
	opAdd32Reg  = unix.BPF_ALU | unix.BPF_ADD | unix.BPF_X // (u32)dst += src
	opShr32     = unix.BPF_ALU | unix.BPF_RSH              // (u32)dst >>= imm
	opJumpEq    = unix.BPF_JMP | unix.BPF_JEQ              // if dst == imm skip off
	opJumpNe    = unix.BPF_JMP | 0x50                      // if dst != imm skip off
	opJumpLeReg = unix.BPF_JMP | 0xb0 | unix.BPF_X         // if dst <= src skip off
	opCall      = unix.BPF_JMP | 0x80                      // r0 = function imm(r1, ..., r5)
	multiplier  = -0x61c8864f                              // 0x9e3779b1, odd: Knuth's
	helperLoad  = 68                                       // bpf_skb_load_bytes_relative
	helperPick  = 82                                       // bpf_sk_select_reuseport
	startNet    = 1                                        // BPF_HDR_START_NET
	ethProtocol = 20                                       // offsets in struct sk_reuseport_md
	flowHash    = 32
)

// steerProgram chooses by the hash of the flow or of the source address, or by
// load between the two best for the flow, from the table in use. A closing
// socket's connections, and whatever it can't look up, go by the kernel's hash.
func steerProgram(s Steering, array, state int) []insn {
	const label = 0x7fff // jumps to the end, set below
	p := []insn{
		{op: opMovReg, dst: r6, src: r1},                                              // r6: the context
		{op: opLoad64, dst: r2, src: r6, off: reuseportMigratingSK},                   // is a socket closing?
		{op: opJumpNe, dst: r2, off: label},                                           // then the kernel's hash will do
		{op: opLoadImm64, dst: r7, src: unix.BPF_PSEUDO_MAP_VALUE, imm: int32(state)}, // r7: the state
		{},
	}
	if s == SteerSource {
		const addr, v6 = -24, 0x0000dd86 // of 16 bytes on the stack; ETH_P_IPV6 in network order, on a little-endian machine
		ipv6 := int32(v6)
		if cpu.IsBigEndian {
			ipv6 = 0x86dd
		}
		p = append(p,
			insn{op: opMov, dst: r3}, // zeros, for what an IPv4 address leaves of the 16 bytes
			insn{op: opStore32, dst: fp, src: r3, off: addr + 4},
			insn{op: opStore32, dst: fp, src: r3, off: addr + 8},
			insn{op: opStore32, dst: fp, src: r3, off: addr + 12},
			insn{op: opMovReg, dst: r1, src: r6},
			insn{op: opMov, dst: r2, imm: 12}, // IPv4: 4 bytes at 12
			insn{op: opMov, dst: r4, imm: 4},
			insn{op: opLoad32, dst: r5, src: r6, off: ethProtocol},
			insn{op: opJumpNe, dst: r5, imm: ipv6, off: 2},
			insn{op: opMov, dst: r2, imm: 8}, // IPv6: 16 bytes at 8
			insn{op: opMov, dst: r4, imm: 16},
			insn{op: opMovReg, dst: r3, src: fp},
			insn{op: opAdd, dst: r3, imm: addr},
			insn{op: opMov, dst: r5, imm: startNet},
			insn{op: opCall, imm: helperLoad},
			insn{op: opJumpNe, dst: r0, off: label}, // it could not be read
			insn{op: opLoad32, dst: r8, src: fp, off: addr},
		)
		for off := int16(addr + 4); off < addr+16; off += 4 {
			p = append(p,
				insn{op: opMul32, dst: r8, imm: multiplier},
				insn{op: opLoad32, dst: r2, src: fp, off: off},
				insn{op: opAdd32Reg, dst: r8, src: r2},
			)
		}
	} else {
		p = append(p, insn{op: opLoad32, dst: r8, src: r6, off: flowHash}) // r8: the hash
	}
	p = append(p,
		insn{op: opMul32, dst: r8, imm: multiplier},
		insn{op: opShr32, dst: r8, imm: 22}, // r8: the bucket, 0 to 1023
		insn{op: opShl, dst: r8, imm: 2},
		insn{op: opLoad32, dst: r9, src: r7, off: stateTable}, // r9: the table in use, 0 or 1
		insn{op: opAnd, dst: r9, imm: 1},
		insn{op: opShl, dst: r9, imm: 13}, // log2 of tableSize
		insn{op: opAddReg, dst: r9, src: r8},
		insn{op: opAddReg, dst: r9, src: r7},                   // r9: where the bucket is, but for stateTables
		insn{op: opLoad32, dst: r8, src: r9, off: stateTables}, // r8: the slot of the first in rank
	)
	if s == SteerLoad {
		const loads = stateLoads
		p = append(p,
			insn{op: opLoad32, dst: r9, src: r9, off: stateTables + tableSize/2}, // r9: of the second
			insn{op: opMovReg, dst: r1, src: r8},
			insn{op: opAnd, dst: r1, imm: tableSlots - 1},
			insn{op: opShl, dst: r1, imm: 2},
			insn{op: opAddReg, dst: r1, src: r7},
			insn{op: opLoad32, dst: r1, src: r1, off: loads}, // r1: the queue of the first
			insn{op: opMovReg, dst: r2, src: r9},
			insn{op: opAnd, dst: r2, imm: tableSlots - 1},
			insn{op: opShl, dst: r2, imm: 2},
			insn{op: opAddReg, dst: r2, src: r7},
			insn{op: opLoad32, dst: r2, src: r2, off: loads}, // r2: of the second
			insn{op: opJumpLeReg, dst: r1, src: r2, off: 1},
			insn{op: opMovReg, dst: r8, src: r9}, // the second's is shorter
		)
	}
	p = append(p,
		insn{op: opStore32, dst: fp, src: r8, off: -4},
		insn{op: opMovReg, dst: r1, src: r6},
		insn{op: opLoadImm64, dst: r2, src: unix.BPF_PSEUDO_MAP_FD, imm: int32(array)},
		insn{},
		insn{op: opMovReg, dst: r3, src: fp},
		insn{op: opAdd, dst: r3, imm: -4},
		insn{op: opMov, dst: r4},
		insn{op: opCall, imm: helperPick}, // an empty slot is the kernel's hash
	)
	for i := range p {
		if p[i].off == label {
			p[i].off = int16(len(p) - i - 1)
		}
	}
	return append(p, insn{op: opMov, dst: r0, imm: skPass}, insn{op: opExit})
}

// classicProgram chooses by the source address between the places of the kernel's
// group. Which socket has which doesn't matter, as long as all are this process's.
func classicProgram(places int) []cbpf.Instruction {
	const (
		net = 0xfff00000 // SKF_NET_OFF: from the network header; what comes before is the segment's payload
		k   = 0x9e3779b1
	)
	v6 := []cbpf.Instruction{cbpf.LoadAbsolute{Off: net + 8, Size: 4}}
	for _, off := range []uint32{12, 16, 20} {
		v6 = append(v6, cbpf.TAX{}, cbpf.LoadAbsolute{Off: net + off, Size: 4}, cbpf.ALUOpX{Op: cbpf.ALUOpXor})
	}
	p := []cbpf.Instruction{
		cbpf.LoadAbsolute{Off: net, Size: 1}, // version and header length
		cbpf.ALUOpConstant{Op: cbpf.ALUOpShiftRight, Val: 4},
		cbpf.JumpIf{Cond: cbpf.JumpEqual, Val: 6, SkipTrue: 2},
		cbpf.LoadAbsolute{Off: net + 12, Size: 4},
		cbpf.Jump{Skip: uint32(len(v6))},
	}
	p = append(p, v6...)
	return append(p,
		cbpf.ALUOpConstant{Op: cbpf.ALUOpMul, Val: k},
		cbpf.ALUOpConstant{Op: cbpf.ALUOpShiftRight, Val: 16},
		cbpf.ALUOpConstant{Op: cbpf.ALUOpMod, Val: uint32(places)},
		cbpf.RetA{},
	)
}
