package main

import "github.com/lblisten/lblisten/internal/standin"

// useSystemd has a stand-in for systemd keep the sockets.
func useSystemd(f *fleet) (end func(), err error) {
	service, err := standin.New(f.dir, 64)
	if err != nil {
		return nil, err
	}
	f.env, f.startBy = []string{wayVariable + "=systemd"}, service.Start
	return func() { service.Close() }, nil
}
