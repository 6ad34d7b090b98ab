//go:build !linux

package main

import (
	"errors"
	"fmt"
)

func useSystemd(f *fleet) (end func(), err error) {
	return nil, fmt.Errorf("systemd is on Linux only: %w", errors.ErrUnsupported)
}
