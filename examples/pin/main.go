// Pin loads the BPF program that lets Linux's kernel give the queue of a listener
// that dies to its siblings, and pins it in a BPF file system, from where any
// process that may read and write the file can use it without a privilege:
//
//	sudo go run ./examples/pin /sys/fs/bpf/lblisten
//	lblisten.Listen("tcp", ":8080", lblisten.WithPinnedProgram("/sys/fs/bpf/lblisten"))
//
// It needs CAP_BPF, and a BPF file system at the path (mount -t bpf bpf /sys/fs/bpf).
// The program stays until the file is removed.
package main

import (
	"fmt"
	"os"
	"strings"
)

func main() {
	if len(os.Args) != 2 || strings.HasPrefix(os.Args[1], "-") {
		fmt.Fprintln(os.Stderr, "usage: pin PATH, such as /sys/fs/bpf/lblisten")
		os.Exit(2)
	}
	if err := pin(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "pin:", err)
		os.Exit(1)
	}
	fmt.Println("pinned", os.Args[1])
}
