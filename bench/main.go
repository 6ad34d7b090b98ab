// Command bench measures what accepting costs with lblisten, with package net
// and with other packages, all in one run on one machine, and writes the tables
// and plots of docs/performance.
//
//	go -C bench run .                        # everything, some 15 minutes
//	go -C bench run . -only Stall            # one table, printed only
//	go -C bench run . -quick -out DIR        # everything once, briefly
//	go -C bench run . -only Live -against HEAD~1 -times 5   # two versions of the package, in turn
//
// The load goes to the loopback interface only. It must run on Linux.
package main

// main.go knows the flags and what becomes of results. What is measured is in
// tables_linux.go and the files that it names.

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// options say how long to measure.
type options struct {
	quick    bool
	blocks   int           // ratios are medians of so many blocks
	blockCPU time.Duration // CPU time that each row uses at least in each block
}

// measurement is a table that this system can measure.
type measurement struct {
	name string
	run  func(*options, *Table) error
}

func main() {
	if isChild() {
		child()
		return
	}
	quick := flag.Bool("quick", false, "run everything once and briefly; exact counts are checked, times mean nothing")
	only := flag.String("only", "", "measure the table of this `name` only")
	out := flag.String("out", "", "the `directory` for results (default ../docs/performance, and none with -quick or -only)")
	commit := flag.String("against", "", "measure the table of -only with the package at this `commit` too, in turn")
	times := flag.Int("times", 5, "with -against: `number` of runs of each version")
	flag.Parse()
	if *commit != "" {
		err := errors.New("-against: name the table with -only")
		if *only != "" && unsupported == nil {
			err = against(*commit, *only, max(1, *times))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := bench(*quick, *only, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(quick bool, only, out string) error {
	if unsupported != nil {
		return unsupported
	}
	opt := &options{quick: quick, blocks: 15, blockCPU: 50 * time.Millisecond}
	if quick {
		opt.blocks, opt.blockCPU = 1, time.Millisecond
	}
	if out == "" && !quick && only == "" {
		out = filepath.Join("..", "docs", "performance")
		if _, err := os.Stat(filepath.Join("..", "lblisten.go")); err != nil {
			return errors.New("run it by 'go -C bench run .', or say with -out where the results shall go")
		}
	}

	report := &Report{Machine: thisMachine(), Quick: quick}
	fmt.Println(report.Machine)
	found := false
	for _, m := range measurements {
		if only != "" && !strings.EqualFold(only, m.name) {
			continue
		}
		found = true
		t := &Table{Name: m.name, quick: quick}
		began := time.Now()
		if err := m.run(opt, t); err != nil {
			t.Error = err.Error()
		}
		t.Rows = append(t.Rows, t.skipped...)
		t.Seconds = time.Since(began).Seconds()
		report.Tables = append(report.Tables, t)
		fmt.Printf("\n%s\n", t.text())
	}
	if !found {
		var names []string
		for _, m := range measurements {
			names = append(names, m.name)
		}
		return fmt.Errorf("no table is named %q; there are %s", only, strings.Join(names, ", "))
	}
	fmt.Printf("\n%s", report.bars().text())
	if out != "" {
		if err := report.write(out); err != nil {
			return err
		}
	}
	return report.failed()
}
