//go:build !unix || aix

package lblisten

// Systems without a handoff: they can't pass descriptors (Windows, plan9, wasm),
// or have no flock (AIX). WithHandoff is ErrUnsupported there, so nothing here
// is ever called.

import (
	"context"
	"log/slog"
	"syscall"
)

const (
	canHandoff     = false
	handoffSockets = 0
)

type (
	handoff struct{}
	pooled  struct{}
)

func openHandoff(path string, log *slog.Logger) (*handoff, error) { return nil, ErrUnsupported }

func (h *handoff) close()                                    {}
func (h *handoff) enter(ctx context.Context, a *address)     {}
func (h *handoff) leave(a *address) (others bool)            { return false }
func (h *handoff) bound(p *pooled, at place)                 {}
func (h *handoff) withdraw(p *pooled)                        {}
func (h *handoff) claim(ctx context.Context, p *pooled) bool { return false }
func (h *handoff) giveBack(p *pooled)                        {}
func (h *handoff) state(at place) error                      { return ErrUnsupported }
func (h *handoff) find(a *address) (*socket, error)          { return nil, ErrUnsupported }
func (h *handoff) deposit(ctx context.Context, c syscall.RawConn, a *address, at place) (*pooled, error) {
	return nil, ErrUnsupported
}
