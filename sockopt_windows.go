package lblisten

import (
	"errors"

	"golang.org/x/sys/windows"
)

// isAddrInUse: syscall.EADDRINUSE is an invention of package syscall here.
func isAddrInUse(err error) bool { return errors.Is(err, windows.WSAEADDRINUSE) }
