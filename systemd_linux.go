package lblisten

// Sockets that systemd holds, for a service whose last process ends before the next one
// starts: by its store of file descriptors, or because it has opened them (socket
// activation). Here is what came from systemd, what it keeps, and what is given back.
//
// A socket is in use while an address has it, or spare. Of a spare one that is in the
// store nobody accepts: if no Listen asks for it in time it is taken out and closed.

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lblisten/lblisten/internal/sdnotify"
)

const canSystemd = true

// giveBackAfter is how long a spare socket is kept for a Listen.
var giveBackAfter = 30 * time.Second

// keptPrefix begins the names of what this package stores. A name tells the file of a
// unix socket as well, because the socket can't.
const keptPrefix = "lblisten-"

// firstGiven is the first descriptor that systemd gives to a process.
const firstGiven = 3

// A kept is a socket that systemd holds.
type kept struct {
	name   string      // in the store; "" if it was opened by systemd, or stored by others
	d      *descriptor // a duplicate, so that it can be given to an address
	key    fileKey     // of the socket
	file   fileKey     // of a unix socket that this package has bound
	given  int         // the descriptor that came from systemd, as long as that is left alone; 0 for none
	proven bool        // it came from systemd, so that is known to hold it
	used   bool        // by an address
	spare  time.Time   // since when it isn't
}

// systemd is what systemd holds for this process.
var systemd systemdStore

type systemdStore struct {
	mu     sync.Mutex // guards what follows; nothing is waited for under it
	read   bool       // the environment was read
	err    error      // what is wrong with it
	all    []*kept
	others int   // descriptors in the store that others have put there
	failed error // why the last message may not have been read
}

// receive reads what systemd has given to this process, once.
func (st *systemdStore) receive() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.read {
		st.read = true
		st.err = st.receiveLocked()
	}
	return st.err
}

func (st *systemdStore) receiveLocked() error {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if pid == "" {
		return nil
	}
	const most = 1 << 16
	switch p, err := strconv.Atoi(pid); {
	case err != nil || p <= 0:
		return fmt.Errorf("LISTEN_PID=%q is no process: systemd sets it, unset it otherwise", pid)
	case p != os.Getpid():
		return nil // it was for a parent of this process
	}
	n, err := strconv.Atoi(count)
	if count != "" && (err != nil || n <= 0 || n > most) {
		return fmt.Errorf("LISTEN_FDS=%q is no number of descriptors: systemd sets it, unset it otherwise", count)
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for i := range n {
		name := ""
		if i < len(names) {
			name = names[i]
		}
		if err := st.receiveOneLocked(firstGiven+i, name); err != nil {
			return err
		}
	}
	st.laterLocked()
	return nil
}

// receiveOneLocked takes in a descriptor. What is no listening socket is left alone:
// others may have a use for it.
func (st *systemdStore) receiveOneLocked(fd int, name string) error {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return nil // somebody has closed it
	}
	unix.CloseOnExec(fd)
	ours := strings.HasPrefix(name, keptPrefix)
	if !ours && !strings.HasSuffix(name, ".socket") {
		st.others++
	}
	if !listens(fd) {
		if ours { // its process has died before it listened
			sdnotify.Send(removal(name))
			unix.Close(fd)
		}
		return nil
	}
	d, err := duplicate(uintptr(fd))
	if err != nil {
		return err
	}
	x := &kept{d: d, key: keyOf(d.fd), given: fd, proven: true, spare: time.Now()}
	if ours {
		x.name, x.file = name, fileIn(name)
		unix.Close(fd)
		x.given = 0
	}
	st.all = append(st.all, x)
	return nil
}

func newName(file fileKey) string {
	var b [8]byte
	rand.Read(b[:])
	name := keptPrefix + hex.EncodeToString(b[:])
	if file != (fileKey{}) {
		name += fmt.Sprintf("-%x-%x", file.dev, file.ino)
	}
	return name
}

func fileIn(name string) (file fileKey) {
	if parts := strings.Split(name, "-"); len(parts) == 4 {
		dev, err := strconv.ParseUint(parts[2], 16, 64)
		ino, err2 := strconv.ParseUint(parts[3], 16, 64)
		if err == nil && err2 == nil {
			file = fileKey{dev, ino}
		}
	}
	return file
}

// spareLocked returns the spare sockets of a place, and of which network each is.
func (st *systemdStore) spareLocked(at place) (found []*kept, networks []string) {
	for _, x := range st.all {
		for _, part := range at.split() {
			if !x.used && checkListening(x.d.fd, at, part.network) == nil {
				found, networks = append(found, x), append(networks, part.network)
				break
			}
		}
	}
	return found, networks
}

// unbalanced tells why the kernel doesn't balance n members between the sockets that
// systemd holds of a place: nil if it does, or there is none.
func (st *systemdStore) unbalanced(at place, n int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	found, _ := st.spareLocked(at)
	for _, x := range found {
		var is unix.Stat_t
		switch {
		case !isBalanced(uintptr(x.d.fd)) && x.name == "":
			return errors.New("systemd has opened the socket, without ReusePort=yes")
		case !isBalanced(uintptr(x.d.fd)):
			return errors.New("systemd keeps a socket of the address that the kernel doesn't balance, since the dispatcher was asked for before")
		case n > len(found) && unix.Fstat(x.d.fd, &is) == nil && int(is.Uid) != os.Geteuid():
			return fmt.Errorf("systemd has opened %d sockets as uid %d, to which the kernel lets no process of uid %d add more", len(found), is.Uid, os.Geteuid())
		}
	}
	return nil
}

// take makes listening sockets of what systemd holds of a place.
func (st *systemdStore) take(at place) (socks []*socket, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	found, networks := st.spareLocked(at)
	for i, x := range found {
		ln, err := listenerOf(x.d)
		if err != nil {
			return socks, err
		}
		s, err := newSocket(ln, networks[i], nil)
		if err != nil {
			return socks, err
		}
		s.received, s.kept, s.file = true, x, x.file
		if x.name == "" {
			s.file = lookAtFile(at)
		}
		x.used = true
		if x.given != 0 && keyOf(x.given) == x.key {
			unix.Close(x.given)
		}
		x.given = 0
		socks = append(socks, s)
	}
	return socks, nil
}

// keep has systemd store a socket, unless it holds it already. It returns nil if there
// is no systemd.
func (st *systemdStore) keep(c syscall.RawConn, file fileKey) (*kept, error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, nil
	}
	x := &kept{file: file, name: newName(file), used: true}
	err := control(c, func(fd uintptr) (err error) {
		x.key = keyOf(int(fd))
		x.d, err = duplicate(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	st.mu.Lock()
	if i := slices.IndexFunc(st.all, func(y *kept) bool { return y.key == x.key }); i >= 0 {
		defer st.mu.Unlock()
		x.d.release()
		st.all[i].used = true
		return st.all[i], nil
	}
	st.all = append(st.all, x)
	st.mu.Unlock()
	st.say("FDSTORE=1\nFDPOLL=0\nFDNAME="+x.name, x.d.fd)
	return x, nil
}

// say sends something to systemd, and notes whether that went.
func (st *systemdStore) say(message string, fds ...int) {
	err := sdnotify.Send(message, fds...)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.failed = err
}

// confirm returns when systemd has what it was sent, or doesn't read it.
func (st *systemdStore) confirm() {
	st.mu.Lock()
	failed := st.failed
	st.mu.Unlock()
	if failed != nil || os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	err := sdnotify.Barrier()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.failed = err
}

func removal(name string) string { return "FDSTOREREMOVE=1\nFDNAME=" + name }

// leave makes a socket of an address spare: systemd goes on holding it, for the next
// process, or the next Listen of this one.
func (x *kept) leave() {
	if x == nil {
		return
	}
	systemd.mu.Lock()
	defer systemd.mu.Unlock()
	x.used, x.spare = false, time.Now()
	systemd.laterLocked()
}

// remove has systemd let go of a socket that nobody needs any more.
func (x *kept) remove() {
	if x == nil {
		return
	}
	systemd.mu.Lock()
	had := systemd.dropLocked(x)
	systemd.mu.Unlock()
	if had && x.name != "" {
		systemd.say(removal(x.name))
	}
}

func (st *systemdStore) dropLocked(x *kept) bool {
	i := slices.Index(st.all, x)
	if i < 0 {
		return false
	}
	st.all = slices.Delete(st.all, i, i+1)
	x.d.release()
	return true
}

// laterLocked gives back what is spare now and still is then.
func (st *systemdStore) laterLocked() { time.AfterFunc(giveBackAfter, st.giveBack) }

// giveBack takes out of the store what no Listen has asked for. What systemd has opened
// itself it holds whatever is done here.
func (st *systemdStore) giveBack() {
	st.mu.Lock()
	var names []string
	for _, x := range slices.Clone(st.all) {
		if x.used || x.name == "" || time.Since(x.spare) < giveBackAfter {
			continue
		}
		names = append(names, x.name)
		if sa, err := unix.Getsockname(x.d.fd); err == nil && x.file != (fileKey{}) {
			if sa, ok := sa.(*unix.SockaddrUnix); ok && fileKeyAt(sa.Name) == x.file {
				os.Remove(sa.Name)
			}
		}
		st.dropLocked(x)
	}
	st.mu.Unlock()
	for _, name := range names {
		st.say(removal(name))
	}
}

// holds tells whether systemd holds some sockets of this process: nil, or why not.
func (st *systemdStore) holds(socks []*socket) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	proven, all := true, true
	for _, s := range socks {
		all = all && s.kept != nil
		proven = proven && s.kept != nil && s.kept.proven
	}
	inStore := st.others
	for _, x := range st.all {
		if x.name != "" {
			inStore++
		}
	}
	room, told := os.LookupEnv("FDSTORE")
	most, _ := strconv.Atoi(room)
	switch {
	case proven:
		return nil
	case os.Getenv("NOTIFY_SOCKET") == "":
		return errors.New("systemd keeps no sockets of this process: NOTIFY_SOCKET isn't set; run it by a unit with FileDescriptorStoreMax=")
	case !isMainProcess():
		return errors.New("systemd keeps the sockets of a unit's main process, and this one was started by that: let that one listen, or see NotifyAccess=")
	case st.failed != nil:
		return fmt.Errorf("systemd may not have the sockets of this process: %w", st.failed)
	case !told:
		return errors.New("whether systemd keeps the sockets of this process isn't known before its first restart: systemd tells it from version 254 on, if the unit has FileDescriptorStoreMax=")
	case !all || inStore > most:
		return fmt.Errorf("systemd's store has room for %d descriptors, and %d are to be in it: raise FileDescriptorStoreMax= in the unit", most, inStore)
	}
	return nil
}

// isMainProcess tells whether systemd has started this process itself. It says so from
// version 248 on.
func isMainProcess() bool {
	pid := os.Getenv("SYSTEMD_EXEC_PID")
	return pid == "" || pid == strconv.Itoa(os.Getpid())
}

// keepsPort tells what systemd holds for this process on a port or path that an address
// wants to have: "" for nothing.
func (st *systemdStore) keepsPort(at place) string {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, x := range st.all {
		if x.used {
			continue
		}
		sa, _ := unix.Getsockname(x.d.fd)
		port := 0
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			port = sa.Port
		case *unix.SockaddrInet6:
			port = sa.Port
		}
		if port != 0 && port == at.port {
			return "systemd keeps a socket of this port for the service, which doesn't fit this address: after a change of address stop the unit (systemctl stop) and start it again"
		}
	}
	return ""
}

// isLeftOver tells whether nobody listens at the file of a unix socket: when systemd
// empties its store nobody is there to remove it.
func (*systemdStore) isLeftOver(at place) bool {
	if !at.isFile() {
		return false
	}
	c, err := net.Dial(at.network, at.host)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}
