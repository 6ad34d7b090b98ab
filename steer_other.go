//go:build !linux

package lblisten

// Other kernels steer by the flow and nothing else.

import (
	"net"
	"runtime"
)

type kernelSteering struct{}

func kernelSteers(s Steering) error {
	if s == SteerFlow {
		return nil
	}
	return &hintedError{ErrUnsupported, "the kernel of " + runtime.GOOS + " steers by flow only; WithDispatcher has source and load"}
}

func newKernelSteering(*group, *config) (*kernelSteering, error) { return &kernelSteering{}, nil }

func (*kernelSteering) control(fd uintptr) error     { return nil }
func (*kernelSteering) opened(*socket)               {}
func (*kernelSteering) discard(s *socket)            { s.ln.Close() }
func (*kernelSteering) changed()                     {}
func (*kernelSteering) tick()                        {}
func (*kernelSteering) replaced()                    {}
func (*kernelSteering) onAccept() func(*net.TCPConn) { return nil }
func (*kernelSteering) close()                       {}

func (*kernelSteering) inForce() (s Steering, why, wont error) { return SteerFlow, nil, nil }
