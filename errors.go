package lblisten

// What is wrong and what to do about it; and the log.

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
)

// explain adds to an EADDRINUSE what is behind it and what to do.
func (g *group) explain(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || !isAddrInUse(err) {
		return err
	}
	hint := "a listener that is not balanced, or another user's, has the address: let it use WithLB too, or choose another address"
	switch {
	case g.at.network == "unix" || g.at.network == "unixpacket":
		hint = "another process listens there, or left its socket file: remove the file if nobody does"
	case g.d != nil:
		hint = fmt.Sprintf("another listener has the address, and it can't be shared between processes without WithHandoff (%v): let both use it with the same path, end that one, or choose another address", g.noKernel)
	}
	if g.h != nil {
		if why := g.h.state(g.at); why != nil {
			hint += "; " + why.Error()
		}
	}
	explained := *op
	explained.Err = &hintedError{op.Err, hint}
	return &explained
}

// hintedError adds what to do to an error.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() + " (" + e.hint + ")" }

func (e *hintedError) Unwrap() error { return e.err }

// log is silent without a logger.
func log(l *slog.Logger, msg string, args ...any) {
	if l != nil {
		l.Info("lblisten: "+msg, args...)
	}
}

// inOneLine joins errors as errors.Join does, for a line of a log.
func inOneLine(errs ...error) (all error) {
	for _, err := range errs {
		switch {
		case all == nil:
			all = err
		case err != nil:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// isTemporary is what an error says of itself.
func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

var (
	// ErrUnsupported is what this system, network or address cannot do. It is
	// also an errors.ErrUnsupported.
	ErrUnsupported error = unsupported{}

	// ErrGroupFull is returned for a member past the limit of a group: 256
	// sockets on FreeBSD and DragonFly, whose kernels would let a 257th listen
	// and never give it a connection, and 32768 elsewhere, the limit of Linux.
	ErrGroupFull = errors.New("the group is full")
)

type unsupported struct{}

func (unsupported) Error() string { return "not supported" }

func (unsupported) Is(target error) bool { return target == errors.ErrUnsupported }

// namedAddr is an address as the caller spelled it, for errors.
type namedAddr struct{ network, address string }

func (a namedAddr) Network() string { return a.network }

func (a namedAddr) String() string { return a.address }

// listenError makes err the error of listening on address, if it isn't yet.
func listenError(network, address string, err error) error {
	if _, ok := err.(*net.OpError); ok {
		return err
	}
	return &net.OpError{Op: "listen", Net: network, Addr: namedAddr{network, address}, Err: err}
}
