package lblisten

// What is wrong and what to do about it; and the log.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
)

var (
	// ErrUnsupported says that this system, network or address cannot do it. It is
	// also an errors.ErrUnsupported.
	ErrUnsupported error = unsupported{}

	// ErrGroupFull is returned for a member past the limit of an address: 256
	// sockets on FreeBSD and DragonFly, whose kernels would let a 257th listen
	// and never give it a connection, and 32768 elsewhere, the limit of Linux.
	// Where the kernel steers by source or load it is 1024.
	ErrGroupFull = errors.New("the group is full")
)

type unsupported struct{}

func (unsupported) Error() string        { return "not supported" }
func (unsupported) Is(target error) bool { return target == errors.ErrUnsupported }

// hintedError adds what to do to an error.
type hintedError struct {
	err  error
	hint string
}

// hint adds what to do to an error.
func hint(err error, what string) error { return &hintedError{err, what} }

func (e *hintedError) Error() string { return e.err.Error() + " (" + e.hint + ")" }
func (e *hintedError) Unwrap() error { return e.err }

// namedAddr is an address as the caller spelled it, for errors.
type namedAddr struct{ network, address string }

func (a namedAddr) Network() string { return a.network }
func (a namedAddr) String() string  { return a.address }

// listenError makes err the error of listening on address, if it isn't yet.
func listenError(network, address string, err error) error {
	if _, ok := err.(*net.OpError); ok {
		return err
	}
	return &net.OpError{Op: "listen", Net: network, Addr: namedAddr{network, address}, Err: err}
}

// explain adds to an EADDRINUSE what is behind it and what to do. All that programs
// look at stays: the *net.OpError, in it the *os.SyscallError, in it the number. So
// the text goes where the name of the system call is.
func (a *address) explain(err error) error {
	op, ok := err.(*net.OpError)
	if !ok || !isAddrInUse(err) {
		return err
	}
	what := "a listener that is not balanced, or another user's, has the address: let it use WithLB too, or choose another address"
	switch {
	case a.at.isUnix():
		what = "another process listens there, or left its socket file: remove the file if nobody does"
	case a.d != nil && a.h != nil:
		what = "a listener has the address that isn't the dispatcher's in this handoff: let both name the same directory, and both use WithDispatcher or neither, or end that one, or choose another address"
	case a.d != nil:
		what = fmt.Sprintf("another listener has the address, and it can't be shared between processes without WithHandoff (%v): let both use it with the same path, end that one, or choose another address", a.noKernel)
	}
	if a.systemd {
		if why := systemd.keepsPort(a.at); why != "" {
			what = why
		}
	}
	if a.h != nil {
		if why := a.h.state(a.at); why != nil {
			what += "; " + why.Error()
		}
	}
	explained := *op
	if number, ok := op.Err.(*os.SyscallError); ok {
		explained.Err = &os.SyscallError{Syscall: number.Syscall + " (" + what + ")", Err: number.Err}
	} else {
		explained.Err = hint(op.Err, what)
	}
	return &explained
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

// What is logged at which level.
const (
	routine = slog.LevelDebug // what happens all the time
	news    = slog.LevelInfo  // members or other processes come and go
	trouble = slog.LevelWarn  // protection that was there is lost, or can't be had
)

// log is silent without a logger. It is called without a lock: a Handler may do
// anything.
func log(l *slog.Logger, level slog.Level, msg string, args ...any) {
	if l != nil {
		l.Log(context.Background(), level, "lblisten: "+msg, args...)
	}
}

// A note is a line for the log, for when no lock is held.
type note func()

// note keeps a line until the turn is given back. It is called with the turn.
func (a *address) note(l *slog.Logger, level slog.Level, msg string, args ...any) {
	if l != nil {
		a.notes = append(a.notes, func() { log(l, level, msg, args...) })
	}
}

func writeNotes(notes []note) {
	for _, n := range notes {
		n()
	}
}
