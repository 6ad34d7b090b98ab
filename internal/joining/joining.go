// Package joining tells tests what clients may meet while a socket opens: one of a group
// that is bound, and doesn't listen yet, turns away its share of the connections on some
// kernels, as those of FreeBSD before 15 do. It is tried out.
package joining
