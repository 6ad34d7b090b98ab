//go:build !unix && !windows

package lblisten

// fileKeyAt tells no file from another here.
func fileKeyAt(path string) fileKey { return fileKey{} }
