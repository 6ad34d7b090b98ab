// Package keeper has what cmd/lbkeep needs of package lblisten beyond its public
// functions. lblisten sets the variables as it is initialized.
package keeper

import (
	"context"
	"log/slog"
	"time"
)

var (
	// Keep is lblisten.Keep, but that an address without processes is kept for a while
	// only; 0 is for ever.
	Keep func(ctx context.Context, path string, while time.Duration, log *slog.Logger) error

	// Look returns what is in the directory of a handoff. It changes nothing there.
	Look func(ctx context.Context, path string) (*Contents, error)
)

// Contents are what is in the directory of a handoff.
type Contents struct {
	Processes []Process
	Sockets   []Socket
}

// A Process is one that has answered, or hasn't.
type Process struct {
	ID, PID   string
	Keeper    bool
	Addresses []string // where it listens
	Err       error    // why it didn't tell
}

// A Socket is one that a process holds.
type Socket struct {
	Network, Address string
	Owners           []string // the PIDs of those that accept from it
	Holders          int
	Queued, Backlog  int // -1: the system doesn't tell
}
