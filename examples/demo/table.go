package main

// What the demo prints in the end.

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/lblisten/lblisten"
)

const barWidth = 40

const legend = `lost       neither answered nor refused, and no Accept had returned it
died       with the process that is killed, to which Accept had returned it
refused    nobody listened at that moment
inherited  accepted from the queue of a listener that has closed, or whose
           process has ended; not what the kernel migrates by itself
`

func printVerdict(out io.Writer, v verdict) {
	p := paint(out)
	fmt.Fprintln(out)
	fmt.Fprint(out, legend, "\n")
	if len(v.Runs) == 1 {
		printTable(out, p, v.Runs[0])
	} else {
		printComparison(out, p, v.Runs[0], v.Runs[1])
	}
	fmt.Fprintln(out)
	switch ours := v.Runs[0]; {
	case ours.Workers < 2:
	case ours.Balancer == lblisten.BalancerDispatcher.String():
		fmt.Fprintf(out, "The %d workers of %s accept from one socket: all connections wait in one queue.\n", ours.Workers, ours.By)
	default:
		fmt.Fprintf(out, "While all stand still, about 1 in %d connections waits for the worker that goes,\n"+
			"and 1 in %d for the listener that closes.\n", ours.Workers, ours.Workers*ours.Listeners)
	}
	for _, r := range v.Runs {
		printBars(out, r)
	}
	if v.Runs[0].Workers > 1 {
		fmt.Fprintf(out, "\nA worker has fewer after rounds in which it was stopped or killed: the others\naccept what was queued for it.\n")
	}
	ours := v.Runs[0]
	fmt.Fprintf(out, "\nin force: balancer %s\nwho takes over if a listener closes: %s\nwho takes over if the process is killed: %s\n",
		ours.Balancer, ours.OnClose, ours.OnKill)
	if ours.Reason != "" {
		fmt.Fprintf(out, "nothing stronger because %s\n", ours.Reason)
	}
	fmt.Fprintln(out)
	switch {
	case v.Unaccounted > 0:
		fmt.Fprintf(out, "%d clients are unaccounted for: these numbers are wrong\n", v.Unaccounted)
	case v.Broken > 0:
		fmt.Fprintf(out, "broken: %d connections were lost where lblisten claims 0\n", v.Broken)
	default:
		claimed := 0
		for _, c := range ours.Cases {
			if c.Claimed {
				claimed++
			}
		}
		fmt.Fprintf(out, "every claim was kept: 0 lost in %d of %d cases, those in which Info says\nthat somebody takes over\n", claimed, len(ours.Cases))
	}
}

// paint returns what colours a text: nothing, but on a terminal, and as NO_COLOR says
// (no-color.org).
func paint(out io.Writer) func(colour int, text string) string {
	f, ok := out.(*os.File)
	if ok && os.Getenv("NO_COLOR") == "" {
		if st, err := f.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 {
			return func(colour int, text string) string { return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, text) }
		}
	}
	return func(_ int, text string) string { return text }
}

const red, green = 31, 32

// lost is the number, in red if it isn't 0, and in green if 0 was claimed.
func (t *tally) lost(p func(int, string) string, width int) string {
	text := fmt.Sprintf("%*d", width, t.Lost)
	switch {
	case t.Lost > 0:
		return p(red, text)
	case t.Claimed:
		return p(green, text)
	}
	return text
}

// short is the case in fewer words.
func (t *tally) short() string { return strings.Replace(t.Case, ", all ", ", ", 1) }

// rows are the cases and the sum, with a line between them.
func (r *result) rows() []*tally { return append(append([]*tally(nil), r.Cases...), &r.Total) }

func printTable(out io.Writer, p func(int, string) string, r *result) {
	const format = "%-36s %5v %6v %s %4v %7v %9v\n"
	fmt.Fprintf(out, format, r.By, "of", "served", " lost", "died", "refused", "inherited")
	for i, t := range r.rows() {
		if i == len(r.Cases) {
			fmt.Fprintln(out, strings.Repeat("-", 80))
		}
		fmt.Fprintf(out, format, t.short(), t.Connections, t.Served, t.lost(p, 5), t.Died, t.Refused, t.Inherited)
	}
}

func printComparison(out io.Writer, p func(int, string) string, ours, theirs *result) {
	const format = "%-36s %6v |%7v %s %5v %8v %10v |%7v %s %5v %8v\n"
	fmt.Fprintf(out, "%-36s %6s |%-40s |%s\n", "", "", ours.By, theirs.By)
	fmt.Fprintf(out, format, "", "of", "served", "  lost", "died", "refused", "inherited", "served", "  lost", "died", "refused")
	for i, t := range ours.rows() {
		u := theirs.rows()[i]
		if i == len(ours.Cases) {
			fmt.Fprintln(out, strings.Repeat("-", 115))
		}
		fmt.Fprintf(out, format, t.short(), t.Connections, t.Served, t.lost(p, 6), t.Died, t.Refused, t.Inherited,
			u.Served, u.lost(p, 6), u.Died, u.Refused)
	}
}

// printBars shows how the connections were spread.
func printBars(out io.Writer, r *result) {
	most := 1
	for _, w := range r.Accepted {
		for _, n := range w {
			most = max(most, n)
		}
	}
	fmt.Fprintf(out, "\naccepted by each listener (%s)\n", r.By)
	for i, w := range r.Accepted {
		for j, n := range w {
			fmt.Fprintf(out, "  worker %d, listener %d %7d %s\n", i+1, j+1, n, strings.Repeat("#", (n*barWidth+most/2)/most))
		}
	}
}
