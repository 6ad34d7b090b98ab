//go:build unix && !aix

package lblisten

// The keeper: a process that holds the pool of a handoff and accepts nothing.

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/lblisten/lblisten/internal/keeper"
)

func init() { keeper.Keep = keep }

// keeperExchanges is how many times exchangeTime a keeper that ends waits for another one.
const keeperExchanges = 5

// keep is Keep. An address without processes is kept for a while, 0 for ever.
func keep(ctx context.Context, path string, while time.Duration, log *slog.Logger) error {
	if filepath.IsAbs(path) {
		path = filepath.Clean(path)
	}
	// The others hear at once that it is a keeper: the one before may be about to go.
	h, err := openHandoff(path, log, nil, func(h *handoff) { h.setKeeper(1, while) })
	if err != nil {
		return fmt.Errorf("lblisten: Keep: %w", err)
	}
	defer h.close()
	h.mu.Lock()
	h.sayLocked(log, news, "this process keeps the sockets of the handoff", "path", path, "processes", len(h.links))
	h.mu.Unlock()
	<-ctx.Done()
	// Another keeper, which may have come an instant ago, is to have everything: it is given
	// some seconds, as long as it answers.
	for range keeperExchanges {
		err := h.await(context.Background(), exchangeTime, func() bool {
			for x, peer := range h.pool.peers {
				if peer.keeper && !peer.silent && !h.pool.hasAll(x) {
					return false
				}
			}
			return len(h.dialing) == 0
		})
		if err == nil {
			break
		}
		h.ask(context.Background(), frame{kind: frameAsk}, nil)
	}
	h.setKeeper(-1, while)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.pool.peers) == 0 { // what it alone keeps ends, as with its last listener
		for _, s := range h.pool.sockets {
			if !s.mine && !h.pool.on[s.at] {
				h.removeFileOf(s)
			}
		}
	}
	return nil
}

// removeFileOf removes the file of a unix socket that nobody is left for, as its last
// listener does.
func (h *handoff) removeFileOf(s *pooled) {
	if s.file != (fileKey{}) && lookAtFile(s.at) == s.file {
		os.Remove(s.at.host)
	}
}

// setKeeper counts calls of Keep.
func (h *handoff) setKeeper(more int, while time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keepers += more
	h.keepFor, h.pool.keeper = while, h.keepers > 0
	f := frame{kind: frameKeeper}
	if h.pool.keeper {
		f.flags = flagOK
	}
	h.tellLocked(f)
}
