package lblisten

// The table that the steering program looks up, and the sampler that fills it with
// the lengths of the queues. It knows nothing of when it is in force.

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A steerTable is what the steering program with maps looks up, and the program.
type steerTable struct {
	program int // descriptors
	array   int // of sockets, by slot
	state   int // of the state, mapped at mem
	mem     []byte
	slots   [tableSlots]*socket
}

// newSteerTable loads the program. It needs CAP_BPF.
func newSteerTable(s Steering) (*steerTable, error) {
	t := &steerTable{program: -1, array: -1, state: -1}
	var err error
	if t.array, err = createMap(unix.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 8, tableSlots, 0); err == nil {
		t.state, err = createMap(unix.BPF_MAP_TYPE_ARRAY, stateSize, 1, unix.BPF_F_MMAPABLE)
	}
	if err == nil {
		t.mem, err = unix.Mmap(t.state, 0, (stateSize+os.Getpagesize()-1)&^(os.Getpagesize()-1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err == nil {
		t.program, err = loadProgram(steerProgram(s, t.array, t.state))
	}
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *steerTable) close() {
	if t.mem != nil {
		unix.Munmap(t.mem)
	}
	for _, fd := range []int{t.program, t.array, t.state} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (t *steerTable) word(offset int) *uint32 { return (*uint32)(unsafe.Pointer(&t.mem[offset])) }

// fill makes the program choose between sockets: it gives each a slot, ranks
// them for every bucket of the hash in the table that is not in use, and then
// has the program use that one.
func (t *steerTable) fill(socks []*socket) error {
	if len(socks) > tableSlots {
		return fmt.Errorf("steering is for at most %d sockets: %w", tableSlots, ErrUnsupported)
	}
	slots := make([]int, len(socks))
	for i, s := range socks {
		slots[i] = slices.Index(t.slots[:], s)
		if slots[i] >= 0 {
			continue
		}
		slots[i] = slices.Index(t.slots[:], nil)
		if slots[i] < 0 {
			return fmt.Errorf("steering is for at most %d sockets: %w", tableSlots, ErrUnsupported)
		}
		if err := onSocket(s, func(fd int) error { return updateMap(t.array, uint32(slots[i]), uint64(fd)) }); err != nil {
			return fmt.Errorf("putting a socket into the program's table: %w", err)
		}
		t.slots[slots[i]] = s
		s.slot.Store(int32(slots[i]) + 1)
	}
	table := 1 - int(atomic.LoadUint32(t.word(stateTable)))
	id := func(i int) uint64 { return uint64(slots[i]) + 1 }
	for bucket := range tableBuckets {
		key := weight(uint64(bucket), 0x5bd1e995)
		first := firstInRank(key, len(slots), id, func(int) bool { return true })
		second := firstInRank(key, len(slots), id, func(i int) bool { return i != first })
		if second < 0 {
			second = first
		}
		at := stateTables + table*tableSize + 4*bucket
		atomic.StoreUint32(t.word(at), uint32(slots[first]))
		atomic.StoreUint32(t.word(at+tableSize/2), uint32(slots[second]))
	}
	atomic.StoreUint32(t.word(stateTable), uint32(table))
	return nil
}

// drop frees the slot of a socket that is closed; the kernel has emptied it.
func (t *steerTable) drop(s *socket) {
	if i := slices.Index(t.slots[:], s); i >= 0 {
		t.slots[i] = nil
	}
}

// A sampler writes the lengths of the queues where the program reads them, while
// there is traffic.
type sampler struct {
	asleep  atomic.Bool
	wake    chan struct{}
	quit    chan struct{}
	ended   chan struct{}
	started bool // guarded by group.mu
}

const (
	sampleEvery = time.Millisecond
	sampleFor   = 100 * time.Millisecond // without traffic
)

// start starts the sampler, for SteerLoad. It is called under group.mu.
func (k *kernelSteering) start() {
	s := &k.sampler
	if s.started || k.table == nil {
		return
	}
	s.started = true
	s.wake, s.quit, s.ended = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go k.sample()
}

func (k *kernelSteering) sample() {
	s := &k.sampler
	defer close(s.ended)
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	busy := time.Now()
	var last uint64
	for {
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
		accepted, waiting := uint64(0), false
		for _, l := range *k.g.members.Load() {
			accepted += l.accepted.Load()
			for _, sock := range l.socks {
				queued, _ := queueLengths([]syscall.RawConn{sock.conn})
				if queued < 0 {
					continue
				}
				waiting = waiting || queued > 0
				if slot := sock.slot.Load(); slot > 0 {
					atomic.StoreUint32(k.table.word(stateLoads+4*int(slot-1)), uint32(queued))
				}
			}
		}
		if accepted != last || waiting {
			last, busy = accepted, time.Now()
			continue
		}
		if time.Since(busy) < sampleFor {
			continue
		}
		// No traffic: sleep until an Accept has returned a connection.
		s.asleep.Store(true)
		select {
		case <-s.quit:
			return
		case <-s.wake:
		}
		busy = time.Now()
	}
}

// awake is called after an Accept returned a connection.
func (s *sampler) awake() {
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		s.wake <- struct{}{}
	}
}
