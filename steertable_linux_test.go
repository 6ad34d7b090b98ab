package lblisten

// Steering by load, for which a table has the lengths of the queues.

import (
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// One of four listeners stalls for half of the time. By the kernel's hash its
// share of the connections waits; by load next to none does.
func TestSteerLoadByKernel(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	share := func(s Steering) float64 {
		g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(s))
		require.Equal(t, s, g.Info().Steering)
		var wg sync.WaitGroup
		var accepted atomic.Int64
		for _, l := range ls[1:] {
			wg.Add(1)
			go echo(&wg, l, &accepted)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			half := limit(500 * time.Millisecond)
			next := time.Now() // a slow machine's load lasts no longer than the first
			for {
				if time.Now().After(next) {
					time.Sleep(half)
					next = time.Now().Add(half)
				}
				c, err := acceptBy(ls[0], limit(50*time.Millisecond))
				if err != nil {
					if g.Info().Members == 0 || ls[0].Info().Members == 0 {
						return
					}
					continue
				}
				wg.Add(1)
				go func() {
					defer wg.Done()
					var b [1]byte
					c.Read(b[:])
					c.Write(b[:])
					c.Read(b[:])
					c.Close()
				}()
			}
		}()
		d := new(load)
		var late atomic.Int64
		n := count(4000, 1000)
		tick := time.NewTicker(limit(500 * time.Microsecond)) // 2000 connections/s
		defer tick.Stop()
		for range n {
			<-tick.C
			d.wg.Add(1)
			go func() {
				defer d.wg.Done()
				start := time.Now()
				d.one("tcp", g.Addr().String())
				if time.Since(start) > limit(100*time.Millisecond) {
					late.Add(1)
				}
			}()
		}
		d.end(t, false)
		require.NoError(t, g.Close())
		wg.Wait()
		return 100 * float64(late.Load()) / float64(d.served.Load())
	}
	flow, load := share(SteerFlow), share(SteerLoad)
	for range 2 { // a busy machine only adds to it
		if load >= 0.5 {
			t.Logf("%.2f %% by load: trying again", load)
			load = share(SteerLoad)
		}
	}
	t.Logf("waited longer than %v: %.2f %% by the kernel's hash, %.2f %% by load", limit(100*time.Millisecond), flow, load)
	require.Less(t, load, 0.5)
	require.Greater(t, flow, 2.0, "the stall must show by the hash")
}

// A member that doesn't accept stops getting connections within a sample, and
// segments of strangers, which the program is run for too, change nothing.
func TestStalledMemberIsAvoided(t *testing.T) {
	needBPF(t)
	noLeaks(t)
	g, ls := newTestGroup(t, 4, "tcp", "127.0.0.1:0", WithRequireKernel(), WithSteering(SteerLoad))
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for _, l := range ls[1:] {
		wg.Add(1)
		go echo(&wg, l, &accepted)
	}
	stray(t, g.Addr().(*net.TCPAddr), count(100_000, 1000))
	var waiting []net.Conn
	n := count(2000, 200)
	for range n {
		c := dialTest(t, g.Addr())
		c.Write([]byte("x"))
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			waiting = append(waiting, c)
			continue
		}
		c.Close()
	}
	queued := ls[0].Stats().Queued
	t.Logf("%d of %d connections wait for the member that stalls", queued, n)
	require.LessOrEqual(t, queued, n/20)
	for _, l := range ls[1:] { // and the others share evenly
		require.Greater(t, l.Stats().Accepted, uint64(n/3/8))
	}
	require.NoError(t, ls[0].Close())
	for _, c := range waiting { // siblings inherit
		c.SetReadDeadline(time.Now().Add(limit(5 * time.Second)))
		_, err := c.Read(make([]byte, 1))
		require.NoError(t, err)
		c.Close()
	}
	require.Eventually(t, func() bool { return !sampling(g) }, limit(5*time.Second), time.Millisecond, "it samples without traffic")
	before := accepted.Load()
	new(load).one("tcp", g.Addr().String())
	require.Eventually(t, func() bool { return accepted.Load() > before }, limit(5*time.Second), time.Millisecond)
	require.NoError(t, g.Close())
	wg.Wait()
}

// stray sends segments that belong to no connection.
func stray(t *testing.T, to *net.TCPAddr, n int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
	require.NoError(t, err)
	defer unix.Close(fd)
	for i := range n {
		seg := make([]byte, 20)
		binary.BigEndian.PutUint16(seg[0:], uint16(1024+i%60000))
		binary.BigEndian.PutUint16(seg[2:], uint16(to.Port))
		binary.BigEndian.PutUint32(seg[4:], uint32(i))
		seg[12], seg[13] = 5<<4, []byte{0x10, 0x04}[i%2] // ACK, RST
		// The checksum over the pseudo header: 127.0.0.1 twice, protocol, length.
		sum := uint32(0x7f00) + 1 + 0x7f00 + 1 + unix.IPPROTO_TCP + 20
		for j := 0; j < 20; j += 2 {
			sum += uint32(binary.BigEndian.Uint16(seg[j:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(seg[16:], ^uint16(sum))
		if err := unix.Sendto(fd, seg, 0, &unix.SockaddrInet4{Addr: [4]byte(to.IP.To4())}); err != nil && err != unix.ENOBUFS {
			require.NoError(t, err)
		}
	}
}
