//go:build !unix

// Tableflip is for systems that can pass descriptors.
package main

func main() {}
