// Package child is for the examples that start processes and kill them, and count
// what dies with them.
//
// What had a killed process accepted? Its own records miss a connection if it dies
// between Accept and the record. So it is frozen first, and the kernel is asked.
// That takes some milliseconds in which its queues fill: more is at stake than
// without.
package child
