//go:build unix && !aix

package test

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/lblisten/lblisten"
	"golang.org/x/sys/unix"
)

func init() {
	rows = append(rows, struct {
		name string
		open func() (*group, error)
	}{"handoff", func() (*group, error) {
		dir, err := os.MkdirTemp("", "lb")
		if err != nil {
			return nil, err
		}
		g, err := listenGroup(lblisten.WithHandoff(filepath.Join(dir, "handoff")))
		if err != nil {
			os.RemoveAll(dir)
			return nil, err
		}
		closeGroup := g.close
		g.close = func() error {
			defer os.RemoveAll(dir)
			return closeGroup()
		}
		return g, nil
	}})
}

// openDescriptors counts the descriptors of this process.
func openDescriptors() int {
	n := 0
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}

func isRefused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }
