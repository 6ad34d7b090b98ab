// Package standin is a stand-in for systemd as one service sees it: it reads its
// messages, stores its descriptors, and gives them to the next process. For tests and
// examples, on machines that systemd doesn't run.
package standin

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A Service is what systemd keeps for a service.
type Service struct {
	// Most is FileDescriptorStoreMax=. Tells is false for systemd before 254, which
	// doesn't tell the service.
	Most  int
	Tells bool

	path string
	conn *net.UnixConn
	done chan struct{}

	mu     sync.Mutex // guards what follows
	opened []stored   // by systemd: a .socket unit's
	store  []stored
	said   []string // all lines but those of the store
}

type stored struct {
	name string
	fd   int
}

// New makes a service whose NOTIFY_SOCKET is in a directory.
func New(dir string, most int) (*Service, error) {
	s := &Service{Most: most, Tells: true, path: filepath.Join(dir, "notify"), done: make(chan struct{})}
	var err error
	if s.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"}); err != nil {
		return nil, err
	}
	os.Chmod(s.path, 0o666)
	go s.listen()
	return s, nil
}

// NotifySocket is the path of its NOTIFY_SOCKET.
func (s *Service) NotifySocket() string { return s.path }

// Open has systemd listen, as a .socket unit does. The descriptor is a duplicate.
func (s *Service) Open(name string, c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var fd int
	var derr error
	if err := raw.Control(func(f uintptr) { fd, derr = duplicate(int(f)) }); err != nil {
		return err
	}
	if derr != nil {
		return derr
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened = append(s.opened, stored{name, fd})
	return nil
}

func duplicate(fd int) (int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	dup, err := syscall.Dup(fd)
	if err == nil {
		syscall.CloseOnExec(dup)
	}
	return dup, err
}

func (s *Service) listen() {
	defer close(s.done)
	b, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, m, _, _, err := s.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		s.hear(string(b[:n]), descriptors(oob[:m]))
	}
}

func descriptors(oob []byte) (fds []int) {
	all, _ := syscall.ParseSocketControlMessage(oob)
	for _, m := range all {
		if some, err := syscall.ParseUnixRights(&m); err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

func (s *Service) hear(message string, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	name, stores, removes := "stored", false, false
	for _, line := range strings.Split(message, "\n") {
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "FDNAME":
			name = value
		case "FDSTORE":
			stores = true
		case "FDSTOREREMOVE":
			removes = true
		case "FDPOLL", "BARRIER", "":
		default:
			lines = append(lines, line)
		}
	}
	s.said = append(s.said, lines...)
	if removes {
		kept := s.store[:0]
		for _, x := range s.store {
			if x.name == name {
				syscall.Close(x.fd)
			} else {
				kept = append(kept, x)
			}
		}
		s.store = kept
	}
	for _, fd := range fds {
		if !stores || len(s.store) >= s.Most || s.has(fd) {
			syscall.Close(fd) // and so a barrier is answered
			continue
		}
		syscall.CloseOnExec(fd)
		s.store = append(s.store, stored{name, fd})
	}
}

func (s *Service) has(fd int) bool {
	var new, old syscall.Stat_t
	syscall.Fstat(fd, &new)
	for _, x := range s.store {
		if syscall.Fstat(x.fd, &old) == nil && old.Ino == new.Ino {
			return true
		}
	}
	return false
}

// Names are those of the descriptors in the store.
func (s *Service) Names() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.store {
		names = append(names, x.name)
	}
	return names
}

// Said is what the service has said, such as READY=1.
func (s *Service) Said() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.said...)
}

// Start starts a process of the service, with what is in the store.
func (s *Service) Start(cmd *exec.Cmd) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, x := range append(append([]stored(nil), s.opened...), s.store...) {
		fd, err := duplicate(x.fd)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), x.name)
		defer f.Close()
		cmd.ExtraFiles, names = append(cmd.ExtraFiles, f), append(names, x.name)
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+s.path)
	if s.Most > 0 && s.Tells {
		cmd.Env = append(cmd.Env, "FDSTORE="+strconv.Itoa(s.Most))
	}
	if names != nil {
		cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
		// Only the process itself knows what LISTEN_PID has to be.
		cmd.Args = append([]string{"sh", "-c", `export LISTEN_PID=$$; exec "$@"`, "sh", cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
	return cmd.Start()
}

// Empty empties the store, as "systemctl stop" does.
func (s *Service) Empty() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.store {
		syscall.Close(x.fd)
	}
	s.store = nil
}

// Close ends it all.
func (s *Service) Close() error {
	err := s.conn.Close()
	<-s.done
	s.Empty()
	for _, x := range s.opened {
		syscall.Close(x.fd)
	}
	s.opened = nil
	return errors.Join(err, os.Remove(s.path))
}
