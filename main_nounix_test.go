//go:build !unix

package lblisten

import (
	"strings"
	"syscall"
)

// openDescriptors isn't known here.
func openDescriptors() int { return 0 }

func isRefused(err error) bool { return err != nil && strings.Contains(err.Error(), "refused") }

// passingErrors are what Accept fails with for now.
var passingErrors = []error{outOfFiles{}}

// closeDescriptor: descriptors aren't counted here.
func closeDescriptor(c syscall.RawConn) {}
