//go:build !linux

package lblisten

// Other kernels steer by the flow and nothing else.

import "runtime"

type kernelSteering struct{}

func kernelSteers(s Steering) error {
	if s == SteerFlow {
		return nil
	}
	return hint(ErrUnsupported, "the kernel of "+runtime.GOOS+" steers by flow only; WithDispatcher has source and load")
}

func newKernelSteering(*address, *request, []*socket) (*kernelSteering, error) {
	return &kernelSteering{}, nil
}

func takeProgram(fd uintptr) (was bool, none error) { return false, nil }
func noPrograms() error                             { return nil }

func (*kernelSteering) control(fd uintptr) error          { return nil }
func (*kernelSteering) add(*socket)                       {}
func (*kernelSteering) drop(*socket)                      {}
func (*kernelSteering) begin(*socket, *request)           {}
func (*kernelSteering) pin(s *socket, path string) error  { return ErrUnsupported }
func (*kernelSteering) settle()                           {}
func (*kernelSteering) discard(s *socket)                 { s.discard() }
func (*kernelSteering) bell() func()                      { return nil }
func (*kernelSteering) inForce() (s Steering, why error)  { return SteerFlow, nil }
func (*kernelSteering) inherits() (others int, why error) { return 0, kernelInherits() }
func (*kernelSteering) leave(socks []*socket)             {}
func (*kernelSteering) close()                            {}
