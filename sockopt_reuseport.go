//go:build unix && !freebsd && !solaris

package lblisten

import "github.com/libp2p/go-reuseport"

const canReusePort = true

// reusePort is go-reuseport's Control where that sets SO_REUSEADDR and
// SO_REUSEPORT and nothing else. It is not where it would ask for load
// balancing too (FreeBSD), would let others steal the port (Windows), does
// nothing (plan9, wasm) or doesn't compile (Solaris and illumos).
var reusePort = reuseport.Control
