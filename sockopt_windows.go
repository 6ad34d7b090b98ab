package lblisten

import (
	"errors"

	"golang.org/x/sys/windows"
)

// isAddrInUse: syscall.EADDRINUSE is an invention of package syscall here.
func isAddrInUse(err error) bool { return errors.Is(err, windows.WSAEADDRINUSE) }

// fileKeyAt returns the volume and the index of a file: those of a unix socket's too,
// which is a reparse point.
func fileKeyAt(path string) fileKey {
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return fileKey{}
	}
	f, err := windows.CreateFile(name, 0, 0, nil, windows.OPEN_EXISTING, windows.FILE_FLAG_BACKUP_SEMANTICS|windows.FILE_FLAG_OPEN_REPARSE_POINT, 0)
	if err != nil {
		return fileKey{}
	}
	defer windows.CloseHandle(f)
	var is windows.ByHandleFileInformation
	if windows.GetFileInformationByHandle(f, &is) != nil {
		return fileKey{}
	}
	return fileKey{uint64(is.VolumeSerialNumber), uint64(is.FileIndexHigh)<<32 | uint64(is.FileIndexLow)}
}
