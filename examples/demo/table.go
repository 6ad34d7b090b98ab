package main

// What the demo prints in the end.

import (
	"fmt"
	"io"
	"strings"

	"github.com/lblisten/lblisten"
)

const barWidth = 40

func printVerdict(out io.Writer, v verdict) {
	fmt.Fprintln(out)
	if len(v.Runs) == 1 {
		printTable(out, v.Runs[0])
	} else {
		printComparison(out, v.Runs[0], v.Runs[1])
	}
	fmt.Fprint(out, `
lost: neither answered nor refused, and no Accept had returned the connection
died: Accept had returned it to the process, which died with it unanswered
inherited: accepted from the queue that a listener left when it closed, or its process
  ended; what the kernel migrates by itself, or waits in the one queue of a dispatcher,
  isn't counted
`)
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
	ours := v.Runs[0]
	fmt.Fprintf(out, "\nin force: balancer %s; who takes over if a listener closes: %s, if the process is killed: %s\n",
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
		fmt.Fprintf(out, "every claim was kept: 0 lost in %d of %d cases, those for which lblisten claims it\n", claimed, len(ours.Cases))
	}
}

// rows are the cases and the sum, with a line between them.
func (r *result) rows() []*tally { return append(append([]*tally(nil), r.Cases...), &r.Total) }

func printTable(out io.Writer, r *result) {
	const format = "%-40s %11v %7v %6v %6v %8v %10v  %s\n"
	fmt.Fprintf(out, format, r.By, "connections", "served", "lost", "died", "refused", "inherited", "claim")
	for i, t := range r.rows() {
		claim := t.claim()
		if i == len(r.Cases) {
			fmt.Fprintln(out, strings.Repeat("-", 108))
			claim = "-" // each case has its own
		}
		fmt.Fprintf(out, format, t.Case, t.Connections, t.Served, t.Lost, t.Died, t.Refused, t.Inherited, claim)
	}
}

func printComparison(out io.Writer, ours, theirs *result) {
	const format = "%-40s %11v | %7v %6v %6v %8v %10v  %-14s| %7v %6v %6v %8v\n"
	fmt.Fprintf(out, "%-40s %11s | %-56s | %s\n", "", "", ours.By, theirs.By)
	fmt.Fprintf(out, format, "", "connections", "served", "lost", "died", "refused", "inherited", "claim",
		"served", "lost", "died", "refused")
	for i, t := range ours.rows() {
		u, claim := theirs.rows()[i], t.claim()
		if i == len(ours.Cases) {
			fmt.Fprintln(out, strings.Repeat("-", 145))
			claim = "-"
		}
		fmt.Fprintf(out, format, t.Case, t.Connections, t.Served, t.Lost, t.Died, t.Refused, t.Inherited, claim,
			u.Served, u.Lost, u.Died, u.Refused)
	}
}

func (t *tally) claim() string {
	switch {
	case t.Broken > 0:
		return "0 lost: BROKEN"
	case t.Claimed:
		return "0 lost: kept"
	}
	return "none"
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
