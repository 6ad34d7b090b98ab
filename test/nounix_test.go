//go:build !unix || aix

package test

import "strings"

// openDescriptors isn't known here.
func openDescriptors() int { return 0 }

func isRefused(err error) bool { return err != nil && strings.Contains(err.Error(), "refused") }
