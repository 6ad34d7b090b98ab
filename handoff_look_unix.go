//go:build unix && !aix

package lblisten

// How a process joins a handoff, and the look of now and then: whether its file is still
// in the directory, who else is there, which sockets nobody came for, and whether the
// owners live in whose sockets connections stay queued.

import (
	"cmp"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// isSyncedLocked tells whether everybody who was found has told everything, and this
// process has what it asked for.
func (h *handoff) isSyncedLocked() bool {
	for _, p := range h.pool.peers {
		if !p.synced || len(p.wants) > 0 {
			return false
		}
	}
	return len(h.dialing) == 0
}

// join finds the others and hears what they have.
func (h *handoff) join() error {
	h.mu.Lock()
	h.takeReserveLocked()
	h.mu.Unlock()
	err := h.announce()
	if err == nil || isShortage(err) { // whoever can't be found can find others
		err = cmp.Or(err, h.look())
	}
	if err != nil && !isShortage(err) {
		return err
	}
	if h.await(h.quit, patience, h.isSyncedLocked) == errLate {
		h.mu.Lock()
		asked := 0
		for _, peer := range h.pool.peers {
			if !peer.synced {
				clear(peer.wants) // others may have what it doesn't send
			}
		}
		for x, l := range h.links { // each of them has everything, unless it is short of descriptors
			if asked++; asked <= 2 {
				h.pool.peers[x].synced = false
				l.send(parcel{frame: frame{kind: frameTell}})
			}
		}
		h.mu.Unlock()
		h.await(h.quit, exchangeTime-patience, h.isSyncedLocked)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.why, h.settled = err, h.foreign == nil
	return h.foreign
}

// run looks at the directory when a link has ended, and asks whom it doubts, until the
// end.
func (h *handoff) run() {
	defer h.wg.Done()
	defer callNowAndThen(h.tick, h.units)()
	for {
		select {
		case <-h.quit.Done():
			return
		case <-h.poked:
			h.look()
		case owners := <-h.doubted:
			h.ask(h.quit, frame{kind: frameAsk}, nil, owners...)
		}
	}
}

// tick is the look of now and then.
func (h *handoff) tick() {
	h.mu.Lock()
	ends := h.quit.Err() != nil
	if !ends {
		h.wg.Add(1)
	}
	h.mu.Unlock()
	if ends {
		return
	}
	defer h.wg.Done()
	h.lookAtDirectory()
	h.lookAtSockets(h.units())
	h.lookAtQueues()
}

// units is how many of lookEvery are between two looks of this process: one, but more
// where more than looksTogether processes are on an address, so that all together look so
// often at its queues.
func (h *handoff) units() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.suspects {
		return 1
	}
	most := 0
	for at := range h.pool.on {
		n := 0
		for _, peer := range h.pool.peers {
			if peer.on[at] {
				n++
			}
		}
		most = max(most, n)
	}
	return 1 + most/looksTogether
}

// poke has run look at the directory.
func (h *handoff) poke() {
	select {
	case h.poked <- struct{}{}:
	default:
	}
}

// lookAtDirectory announces this process again if somebody has cleaned up, and looks
// for processes that it has no link to if the directory has changed.
func (h *handoff) lookAtDirectory() {
	var err error
	h.mu.Lock()
	looks := h.retry || h.why != nil
	h.retry = false
	file := h.file
	h.mu.Unlock()
	if file == (fileKey{}) || fileKeyAt(h.name()) != file {
		looks, err = true, h.announce()
	}
	if st, serr := os.Stat(h.path); serr == nil && st.ModTime() != h.changed {
		h.changed, h.looks = st.ModTime(), 2 // what changes in the same instant has the same time
	}
	if looks || h.looks > 0 {
		h.looks--
		err = cmp.Or(err, h.look())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if (err == nil) != (h.why == nil) {
		h.sayLocked(h.log, map[bool]slog.Level{true: news, false: trouble}[err == nil], "the directory of the handoff", "path", h.path, "reason", err)
	}
	h.why = err
	h.takeReserveLocked()
}

// lookAtSockets lets go of those that nobody came for.
func (h *handoff) lookAtSockets(units int) {
	h.mu.Lock()
	for _, s := range h.pool.look(units, orphanLooks, int(h.keepFor/lookEvery)) {
		h.sayLocked(h.log, news, "nobody came for a socket, it is closed", "path", h.path, "address", s.at)
		h.removeFileOf(s)
		h.tellLocked(s.frame(frameDrop))
	}
	if h.pool.refused && h.pool.room() {
		h.pool.refused = false
		h.tellLocked(frame{kind: frameTell})
	}
	h.mu.Unlock()
	h.apply()
}

// lookAtQueues has owners asked whether they live in whose sockets something stays queued.
func (h *handoff) lookAtQueues() {
	h.mu.Lock()
	var socks []*pooled
	var fds []unix.PollFd
	for _, s := range h.pool.sockets {
		if s.balanced && h.pool.on[s.at] && !s.mine && !s.shared {
			s.d.hold()
			socks, fds = append(socks, s), append(fds, unix.PollFd{Fd: int32(s.d.fd), Events: unix.POLLIN})
		}
	}
	h.mu.Unlock()
	if socks == nil {
		return
	}
	_, err := unix.Poll(fds, 0)
	var owners []id
	h.mu.Lock()
	h.suspects = false
	for i, s := range socks {
		if s.queued++; err != nil || fds[i].Revents&unix.POLLIN == 0 {
			s.queued = 0
		}
		h.suspects = h.suspects || s.queued > 0
		if s.queued >= queuedLooks {
			s.queued = 0
			for x, held := range s.who {
				if held == owns {
					owners = append(owners, x)
				}
			}
		}
		s.d.release()
	}
	h.mu.Unlock()
	if owners != nil {
		select {
		case h.doubted <- owners:
		default: // it asks already
		}
	}
}
