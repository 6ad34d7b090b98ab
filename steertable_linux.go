package lblisten

// The table that the steering program looks up, and the sampler that writes the
// lengths of the queues beside it. It knows nothing of when it is in force.

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
	among   []*socket // that the program chooses between now

	slotted atomic.Pointer[[tableSlots]*socket] // a copy of slots, for the sampler
}

// newSteerTable loads the program. It needs CAP_BPF.
func newSteerTable(s Steering) (*steerTable, error) {
	if !mayUseBPF() {
		return nil, errNoCapability
	}
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

// fill makes the program choose between sockets, if it doesn't yet: it gives each a
// slot, ranks them for every bucket of the hash in the table that is not in use, and
// then has the program use that one.
func (t *steerTable) fill(socks []*socket) error {
	if slices.Equal(t.among, socks) {
		return nil
	}
	slots, err := t.place(socks)
	if err != nil {
		return err
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
	t.among = slices.Clone(socks)
	return nil
}

// place gives sockets slots, and returns them.
func (t *steerTable) place(socks []*socket) ([]int, error) {
	slots := make([]int, len(socks))
	for i, s := range socks {
		slots[i] = slices.Index(t.slots[:], s)
		if slots[i] >= 0 {
			continue
		}
		slots[i] = slices.Index(t.slots[:], nil)
		if slots[i] < 0 {
			return nil, fmt.Errorf("steering is for at most %d sockets: %w", tableSlots, ErrUnsupported)
		}
		if err := onSocket(s, func(fd int) error { return updateMap(t.array, uint32(slots[i]), uint64(fd)) }); err != nil {
			return nil, fmt.Errorf("putting a socket into the program's table: %w", err)
		}
		t.slots[slots[i]] = s
	}
	t.publish()
	return slots, nil
}

func (t *steerTable) publish() {
	slots := t.slots
	t.slotted.Store(&slots)
}

// drop frees the slot of a socket that is closed; the kernel has emptied it.
func (t *steerTable) drop(s *socket) {
	if i := slices.Index(t.slots[:], s); i >= 0 {
		t.slots[i] = nil
		t.publish()
	}
}

// A sampler writes the lengths of the queues where the program reads them, while
// something moves.
type sampler struct {
	a      *address
	table  *steerTable
	asleep atomic.Bool
	wake   chan struct{}
	quit   chan struct{}
	ended  chan struct{}
}

const (
	sampleEvery = time.Millisecond
	sampleFor   = 100 * time.Millisecond // after the last change
)

func startSampler(a *address, t *steerTable) *sampler {
	s := &sampler{a: a, table: t, wake: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{})}
	go s.run()
	return s
}

// stop ends the sampler, before the table is closed.
func (s *sampler) stop() {
	close(s.quit)
	<-s.ended
}

func (s *sampler) run() {
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
		moved := s.sample()
		var accepted uint64
		for _, l := range *s.a.members.Load() {
			accepted += l.accepted.Load()
		}
		if moved || accepted != last {
			last, busy = accepted, time.Now()
			continue
		}
		if time.Since(busy) < sampleFor {
			continue
		}
		// Nothing moves: sleep until an Accept has returned a connection.
		tick.Stop()
		s.asleep.Store(true)
		select {
		case <-s.quit:
			return
		case <-s.wake:
		}
		tick.Reset(sampleEvery)
		busy = time.Now()
	}
}

// sample looks at the queues once, and tells whether one has changed.
func (s *sampler) sample() (moved bool) {
	slots := s.table.slotted.Load()
	if slots == nil {
		return false
	}
	for i, sock := range slots {
		if sock == nil {
			continue
		}
		queued, _ := queueLengths([]syscall.RawConn{sock.conn})
		if queued < 0 {
			continue
		}
		load := s.table.word(stateLoads + 4*i)
		if atomic.LoadUint32(load) != uint32(queued) {
			atomic.StoreUint32(load, uint32(queued))
			moved = true
		}
	}
	return moved
}

// awake is called after an Accept returned a connection.
func (s *sampler) awake() {
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		s.wake <- struct{}{}
	}
}
