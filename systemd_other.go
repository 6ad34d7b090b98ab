//go:build !linux

package lblisten

// Systems without systemd: WithSystemd is ErrUnsupported there, so nothing else here is
// ever called but by sockets that nobody keeps.

import "syscall"

const canSystemd = false

type kept struct{}

func (x *kept) leave()  {}
func (x *kept) remove() {}

var systemd systemdStore

type systemdStore struct{}

func (systemdStore) receive() error                                      { return ErrUnsupported }
func (systemdStore) unbalanced(at place, n int) error                    { return nil }
func (systemdStore) take(at place) ([]*socket, error)                    { return nil, ErrUnsupported }
func (systemdStore) keep(c syscall.RawConn, file fileKey) (*kept, error) { return nil, ErrUnsupported }
func (systemdStore) confirm()                                            {}
func (systemdStore) holds(socks []*socket) error                         { return ErrUnsupported }
func (systemdStore) keepsPort(at place) string                           { return "" }
func (systemdStore) isLeftOver(at place) bool                            { return false }
