//go:build !unix || aix

package lbhttp

// worker: there is nothing that takes a process of its own here.
func worker(string) {}
