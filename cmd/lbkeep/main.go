// Command lbkeep keeps the sockets of a handoff: while it runs, no queued connection is
// reset and no new one refused, in whatever order the processes end that name the same
// directory with lblisten.WithHandoff; the next one adopts their sockets. So a service of
// one process can be stopped and then started without losing anything.
//
//	lbkeep [-for duration] [-log level] DIRECTORY
//	lbkeep -check DIRECTORY
//
// Run it as the user of the service, before the first of its processes or at any time
// later. It ends by SIGINT or SIGTERM; another lbkeep of the directory, started before,
// takes over. It accepts no connection, and needs no privilege.
//
// With -check it prints the processes, addresses and sockets of the directory, and how
// many connections are queued in each socket (-1 where the system doesn't tell), and exits
// with 1 if an address has sockets and no process listens there, or a process doesn't
// answer. It changes nothing.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	_ "github.com/lblisten/lblisten" // sets what is in keeper
	"github.com/lblisten/lblisten/internal/keeper"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit code: 2 for bad usage.
func run(ctx context.Context, args []string, out, errs io.Writer) int {
	flags := flag.NewFlagSet("lbkeep", flag.ContinueOnError)
	flags.SetOutput(errs)
	flags.Usage = func() {
		fmt.Fprintln(errs, "usage: lbkeep [-for duration] [-log level] DIRECTORY\n       lbkeep -check DIRECTORY")
		flags.PrintDefaults()
	}
	while := flags.Duration("for", 0, "for what `duration`, such as 10m, an address without processes is kept; 0 is for ever")
	level := slog.LevelInfo
	flags.TextVar(&level, "log", level, "the least `level` that is logged, to standard error: debug, info, warn or error")
	check := flags.Bool("check", false, "print what is in the directory; exit with 1 if an address has sockets and no process")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	path := flags.Arg(0)
	switch {
	case flags.NArg() != 1:
		flags.Usage()
		return 2
	case *while < 0:
		fmt.Fprintf(errs, "lbkeep: -for %v: a time can't be negative\n", *while)
		return 2
	case *check:
		return look(ctx, path, out, errs)
	}
	log := slog.New(slog.NewTextHandler(errs, &slog.HandlerOptions{Level: level}))
	if err := keeper.Keep(ctx, path, *while, log); err != nil {
		fmt.Fprintf(errs, "lbkeep: %v\n", err)
		return 1
	}
	return 0
}

// look prints what is in a directory.
func look(ctx context.Context, path string, out, errs io.Writer) (code int) {
	all, err := keeper.Look(ctx, path)
	if err != nil {
		fmt.Fprintf(errs, "lbkeep: %v\n", err)
		return 1
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	var served []string
	fmt.Fprintln(w, "PROCESS\tROLE\tLISTENS ON")
	for _, p := range all.Processes {
		served = append(served, p.Addresses...)
		role, on := "server", strings.Join(p.Addresses, ", ")
		switch {
		case p.Err != nil:
			role, on, code = "?", fmt.Sprintf("(%s doesn't answer: %v)", p.ID, p.Err), 1
		case p.Keeper:
			role = "keeper"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.PID, role, on)
	}
	fmt.Fprintln(w, "\nADDRESS\tNETWORK\tACCEPTED BY\tHELD BY\tQUEUED\tBACKLOG\t")
	for _, s := range all.Sockets {
		by, remark := strings.Join(s.Owners, ", "), ""
		if by == "" {
			by = "all that listen there"
		}
		if !slices.Contains(served, s.Address) {
			by, remark, code = "nobody", "no process listens there", 1
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%s\n", s.Address, s.Network, by, s.Holders, s.Queued, s.Backlog, remark)
	}
	return code
}
