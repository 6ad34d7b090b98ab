// Command dropin runs the suites of other projects with lblisten in the place of
// net.Listen. Each suite runs three times: as it is, with Listen without options, and
// with WithLB. What passes as it is must pass with ours.
//
//	go -C test run ./dropin                               # all
//	go -C test run ./dropin -module emersion/go-smtp -v   # those whose path contains it
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A suite is the part of a module's tests that needs nothing but a loopback interface.
type suite struct {
	module, version string
	packages        []string
	run, skip       string // of go test, for what needs more, or judges by milliseconds
	conflicts       string // tests that expect EADDRINUSE: WithLB is for listening twice
}

var suites = []suite{
	{"github.com/Shopify/toxiproxy/v2", "v2.5.0", []string{"./..."}, "", "Latency|Slicer|Bandwidth",
		"^(TestCreateProxyPortConflict|TestRestartFailedToStartProxy|TestStartTwoProxiesOnSameAddress)$"},
	{"github.com/emersion/go-imap", "v1.2.1", []string{"./client", "./server"}, "", "", ""},
	{"github.com/emersion/go-smtp", "v0.25.1", []string{"./..."}, "", "", ""},
	{"github.com/gliderlabs/ssh", "v0.3.8", []string{"."}, "", "", ""},
	{"github.com/hashicorp/raft", "v1.7.3", []string{"."}, "NetworkTransport|TCPTransport", "", ""},
	{"github.com/miekg/dns", "v1.1.62", []string{"."}, "", "", "^TestServerReuseaddr$"},
	{"github.com/mochi-mqtt/server/v2", "v2.7.9", []string{".", "./listeners", "./packets", "./system"}, "", "", ""},
	{"github.com/pires/go-proxyproto", "v0.8.0", []string{"./..."}, "", "", ""},
	{"github.com/soheilhy/cmux", "v0.1.5", []string{"."}, "", "", ""},
	{"github.com/tidwall/redcon", "v1.6.4", []string{"."}, "", "", ""},
	{"github.com/xtaci/smux", "v1.5.34", []string{"."}, "", "", ""},
}

func main() {
	only := flag.String("module", "", "run only the modules whose path contains this")
	verbose := flag.Bool("v", false, "print what failing tests say")
	flag.Parse()
	ours, ran := 0, 0
	var table strings.Builder
	table.WriteString("| module | version | replaced | as it is | Listen | WithLB |\n|---|---|---|---|---|---|\n")
	for _, s := range suites {
		if !strings.Contains(s.module, *only) {
			continue
		}
		row, faults, err := s.try(*verbose)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", s.module, err)
			os.Exit(1)
		}
		table.WriteString(row)
		ran++
		ours += faults
	}
	fmt.Printf("\nTests: passed/failed/skipped, subtests included.\n\n%s\n%d differences\n", &table, ours)
	if ran == 0 || ours > 0 {
		os.Exit(1)
	}
}

// try runs a suite in all variants. It returns a row of the table, and how many tests
// fail with lblisten only.
func (s suite) try(verbose bool) (row string, faults int, err error) {
	tmp, err := os.MkdirTemp("", "dropin")
	if err != nil {
		return "", 0, err
	}
	defer os.RemoveAll(tmp)
	t := tree{suite: s, dir: filepath.Join(tmp, "module"), overlays: tmp}
	fmt.Printf("== %s %s\n", s.module, s.version)
	if err := t.fetch(); err != nil {
		return "", 0, err
	}
	before, err := t.test(asItIs)
	if err != nil {
		return "", 0, err
	}
	before.print("fails without us too", verbose)
	row = fmt.Sprintf("| %s | %s | ", s.module, s.version)
	cells := before.String()
	for _, v := range []variant{plain, withLB} {
		n, err := t.replace(v)
		if err != nil {
			return "", 0, err
		}
		if v == plain {
			row += fmt.Sprintf("%d | ", n)
		}
		after, err := t.test(v)
		if err != nil {
			return "", 0, err
		}
		cells += " | " + after.String()
		n, err = t.compare(before, after, v, verbose)
		if err != nil {
			return "", 0, err
		}
		faults += n
	}
	return row + cells + " |\n", faults, nil
}
