//go:build !unix || aix

package lblisten

// Systems without a handoff: they can't pass descriptors (Windows, plan9, wasm), or it
// isn't tried there (AIX). WithHandoff and Keep are ErrUnsupported there, so nothing
// else here is ever called.

import (
	"context"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/lblisten/lblisten/internal/keeper"
)

const canHandoff = false

func init() {
	keeper.Keep = keep
	keeper.Look = func(context.Context, string) (*keeper.Contents, error) {
		return nil, fmt.Errorf("a handoff is %w by this system", ErrUnsupported)
	}
}

type (
	handoff struct{}
	pooled  struct{}
)

func openHandoff(path string, log *slog.Logger, a *address, begin func(*handoff)) (*handoff, error) {
	return nil, ErrUnsupported
}

func (h *handoff) units() int                                { return 1 }
func (h *handoff) close()                                    {}
func (h *handoff) enter(a *address)                          {}
func (h *handoff) leave(a *address) (others bool)            { return false }
func (h *handoff) mayBeHeld(s *socket) bool                  { return false }
func (h *handoff) bound(s *pooled, at place, file fileKey)   {}
func (h *handoff) withdraw(s *pooled)                        {}
func (h *handoff) letShare(s *pooled)                        {}
func (h *handoff) isOwned(s *pooled) bool                    { return false }
func (h *handoff) claim(ctx context.Context, s *pooled) bool { return false }
func (h *handoff) giveBack(s *pooled)                        {}
func (h *handoff) state(at place) error                      { return ErrUnsupported }
func (h *handoff) depositKept(ctx context.Context, s *socket, a *address) (*pooled, error) {
	return nil, ErrUnsupported
}
func (h *handoff) find(a *address) (*socket, error) { return nil, ErrUnsupported }
func (h *handoff) deposit(ctx context.Context, c syscall.RawConn, a *address, at place) (*pooled, error) {
	return nil, ErrUnsupported
}

func keep(context.Context, string, time.Duration, *slog.Logger) error {
	return fmt.Errorf("lblisten: Keep is %w by this system", ErrUnsupported)
}
