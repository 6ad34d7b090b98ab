// Command member is a process of a handoff and nothing else, for the benchmark suite: what
// one costs shows in it alone. Its arguments are the handoff, the address, and how many MB
// of memory it fills. It says ready, listens when it is told to, says how many microseconds
// that took, and answers each connection with a byte if it is told to accept.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/lblisten/lblisten"
)

func main() {
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func serve(path, addr, megabytes string) error {
	n, err := strconv.Atoi(megabytes)
	if err != nil {
		return err
	}
	fill := make([]byte, n<<20)
	defer runtime.KeepAlive(fill)
	for i := 0; i < len(fill); i += os.Getpagesize() {
		fill[i] = 1
	}
	lines := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	lines.Scan()
	began := time.Now()
	g, err := lblisten.ListenGroup(context.Background(), "tcp", addr, 1, lblisten.WithHandoff(path))
	if err != nil {
		return err
	}
	defer g.Close()
	fmt.Println(time.Since(began).Microseconds(), g.Addr())
	for lines.Scan() {
		switch lines.Text() {
		case "accept":
			go accept(g.Listeners()[0])
			fmt.Println("accepts")
		default:
			fmt.Println(g.Info().OnKill)
		}
	}
	return nil
}

func accept(l *lblisten.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		c.Write([]byte{'x'})
		c.Close()
	}
}
