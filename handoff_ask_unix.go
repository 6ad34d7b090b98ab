//go:build unix && !aix

package lblisten

// Questions to other processes of a handoff, and waiting for what they say.

import (
	"context"
	"errors"
	"slices"
	"time"
)

// A question was asked of others.
type question struct {
	waiting map[id]bool // whose answer is to come
	yes, no int
}

// ask asks some processes, or all, and returns when each has answered or is gone.
// Whoever doesn't answer in time is silent from then on, and isn't waited for any more.
// A socket goes with its descriptor to those that read, and is only named to the others:
// descriptors on their way are limited.
func (h *handoff) ask(ctx context.Context, f frame, d *descriptor, some ...id) (*question, error) {
	h.mu.Lock()
	h.lastN = max(1, h.lastN+1)
	f.n = h.lastN
	q := &question{waiting: make(map[id]bool)}
	h.questions[f.n] = q
	for x, l := range h.links {
		if len(some) == 0 || slices.Contains(some, x) {
			p := parcel{frame: f}
			if !h.pool.peers[x].silent {
				q.waiting[x] = true
				if p.d = d; d != nil {
					p.kind = frameSocket
				}
			}
			l.send(p)
		}
	}
	h.mu.Unlock()
	err := h.await(ctx, exchangeTime, func() bool { return len(q.waiting) == 0 })
	h.mu.Lock()
	delete(h.questions, f.n)
	late := err == errLate
	for x := range q.waiting {
		if late && !h.pool.peers[x].silent {
			h.pool.peers[x].silent = true
			h.pool.lacks = h.pool.lacks || len(h.pool.peers[x].wants) > 0 // others may have it
			h.sayLocked(h.log, trouble, "a process of the handoff doesn't answer (is it stopped?); its sockets are served by the others", "path", h.path, "process", x)
		}
	}
	h.mu.Unlock()
	if late {
		h.apply()
		err = nil
	}
	return q, err
}

var errLate = errors.New("no answer")

// await waits until something is so, which is asked with the lock: for most at the
// most. It counts steps instead of reading a clock, so that a process that is stopped
// meanwhile takes nobody for silent when it goes on.
func (h *handoff) await(ctx context.Context, most time.Duration, isSo func() bool) error {
	const steps = 20
	step := time.NewTicker(most / steps)
	defer step.Stop()
	h.mu.Lock()
	h.awaiting++
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		h.awaiting--
		h.mu.Unlock()
	}()
	for left := steps; ; {
		h.mu.Lock()
		so, turn := isSo(), h.turn
		h.mu.Unlock()
		switch {
		case so:
			return nil
		case left == 0:
			return errLate
		}
		select {
		case <-turn:
		case <-step.C:
			left--
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
