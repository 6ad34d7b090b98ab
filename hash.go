package lblisten

// Keys of connections, and the choice of a member by rendezvous hashing
// (highest random weight): when a member goes, only its keys move, and they
// spread over all others. Nothing here knows what a member does.

import (
	"encoding/binary"
	"hash/maphash"
	"math/rand/v2"
	"net"
	"reflect"
)

// seed keys the hashes, so that a client can't choose its ports to hit one
// member.
var seed = maphash.MakeSeed()

// flowKey hashes the addresses and ports of both ends. A connection without TCP
// addresses has no flow: its key is random.
func flowKey(local, remote net.Addr) uint64 {
	from, ok := remote.(*net.TCPAddr)
	if !ok {
		return rand.Uint64()
	}
	var b [36]byte
	putAddr(b[:18], from)
	if to, ok := local.(*net.TCPAddr); ok {
		putAddr(b[18:], to)
	}
	return maphash.Bytes(seed, b[:])
}

// sourceKey hashes the client's address without its port; an IPv4 address and
// its IPv4-mapped form are one.
func sourceKey(remote net.Addr) uint64 {
	from, ok := remote.(*net.TCPAddr)
	if !ok {
		return rand.Uint64()
	}
	var b [18]byte
	putAddr(b[:], from)
	return maphash.Bytes(seed, b[:16])
}

// isTLS tells whether a connection is a *tls.Conn, without importing crypto/tls,
// which is larger than all else that the package needs.
func isTLS(c net.Conn) bool {
	t := reflect.TypeOf(c)
	return t.Kind() == reflect.Pointer && t.Elem().PkgPath() == "crypto/tls" && t.Elem().Name() == "Conn"
}

// putAddr writes 16 bytes of address, IPv4 in its mapped form, and 2 of port.
func putAddr(b []byte, a *net.TCPAddr) {
	if len(a.IP) == net.IPv4len {
		b[10], b[11] = 0xff, 0xff
		copy(b[12:16], a.IP)
	} else {
		copy(b[:16], a.IP)
	}
	binary.BigEndian.PutUint16(b[16:18], uint16(a.Port))
}

// weight mixes a key and a member's identity (the finalizer of splitmix64). The
// member with the highest weight is first in rank for the key.
func weight(key, id uint64) uint64 {
	x := key ^ id*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// firstInRank returns the index of the member with the highest weight for key
// among those of n that may be chosen, or -1 if none may.
func firstInRank(key uint64, n int, id func(int) uint64, may func(int) bool) int {
	first, highest := -1, uint64(0)
	for i := range n {
		if !may(i) {
			continue
		}
		if w := weight(key, id(i)); first < 0 || w > highest {
			first, highest = i, w
		}
	}
	return first
}
