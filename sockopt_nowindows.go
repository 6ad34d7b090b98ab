//go:build !unix && !windows

package lblisten

import "strings"

// isAddrInUse goes by the text, because plan9 has no error number.
func isAddrInUse(err error) bool { return strings.Contains(err.Error(), "in use") }
