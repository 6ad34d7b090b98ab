package lblisten

// What the kernels can do with listening sockets, as far as it can be known before
// one is asked. sockopt_SYSTEM.go has the values, and how a socket joins the
// kernel's group; what depends on more than the system is probed there.

// capabilities are what the kernel of a system can.
type capabilities struct {
	option         string // the socket option by which it balances
	groupLimit     int    // the most sockets of a kernel's group that get connections
	splitDualStack bool   // a dual-stack socket is no good member: a member has an IPv4 and an IPv6 one
	pinned         bool   // it takes a program that is pinned in a file system
}
