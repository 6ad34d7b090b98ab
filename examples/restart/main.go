// Restart shows a restart without downtime: an HTTP server under load that is
// restarted again and again, and not a single request that fails.
//
// There is no supervisor and no privilege in it. All servers name one directory, and
// so hold duplicates of each other's listening sockets (lblisten.WithHandoff). The
// queued connections of the one that goes are taken over by the one that stays. Where
// none stays, a keeper holds the sockets for the next one (lblisten.Keep, in the driver
// here, and as a program lbkeep), or systemd does (lblisten.WithSystemd; here a stand-in
// for it). What to copy is in server.go; the rest is the experiment:
//
//	go run ./examples/restart                        # starts the new one, then stops the old one
//	go run ./examples/restart -order old-first       # two servers, restarted one after the other
//	go run ./examples/restart -processes 1           # one server: stopped, then started, three ways
//	go run ./examples/restart -processes 1 -compare  # and with net.Listen, and tableflip
//	go run ./examples/restart -kill 3                # every third is killed (SIGKILL), on Linux
//
// The driver, without a job, starts the servers and the clients. Half of the
// clients open a connection for each request, half keep theirs. A request fails
// if http.Client fails, which repeats a GET by itself when the server has closed
// an idle connection. What a killed server had accepted dies with it, and is
// counted apart.
//
// A server is the same program with its job in the environment, as restart.sh and
// the systemd unit lblisten-example@.service start it:
//
//	LBLISTEN_RESTART_ADDR=127.0.0.1:8080 LBLISTEN_RESTART_HANDOFF=/run/NAME/handoff restart
//
// The exit status of the driver is 0 if no request failed, 1 if not, and 2 for a
// wrong flag.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/lblisten/lblisten/examples/internal/child"
)

const (
	// addrVariable and handoffVariable are the job of a server: where it listens,
	// and the directory of the handoff, which all servers of the address name.
	addrVariable    = "LBLISTEN_RESTART_ADDR"
	handoffVariable = "LBLISTEN_RESTART_HANDOFF"

	// wayVariable has a server listen in another way than by a handoff.
	wayVariable = "LBLISTEN_RESTART_WAY"

	// drivenVariable makes a server end with its standard input, so that none
	// outlives the driver.
	drivenVariable = "LBLISTEN_RESTART_DRIVEN"
)

const (
	newFirst = "new-first" // the next one starts before the old one stops
	oldFirst = "old-first" // two servers: one stops, then its successor starts
)

type settings struct {
	restarts  int
	clients   int
	processes int
	compare   bool
	order     string
	kill      int
}

func parseFlags() (settings, error) {
	var s settings
	flag.IntVar(&s.restarts, "restarts", 20, "`number` of restarts, 1 to 100000")
	flag.IntVar(&s.clients, "clients", 64, "`number` of clients, 2 to 1000")
	flag.IntVar(&s.processes, "processes", 2, "`number` of servers that overlap: 2, in an order; or 1, which stops and is then started, with nobody, a keeper, and a stand-in for systemd that hold its sockets")
	flag.BoolVar(&s.compare, "compare", false, "with -processes 1: restart servers with net.Listen and with tableflip, too")
	flag.StringVar(&s.order, "order", newFirst, newFirst+": start the next server, then stop the old one; "+oldFirst+": the other way round, beside another server")
	flag.IntVar(&s.kill, "kill", 0, "kill every `n`th server that goes (SIGKILL) instead of stopping it; 0: none; Linux only")
	flag.Parse()
	switch {
	case s.restarts < 1 || s.restarts > 100000:
		return s, fmt.Errorf("-restarts %d: ask for 1 to 100000", s.restarts)
	case s.clients < 2 || s.clients > 1000:
		return s, fmt.Errorf("-clients %d: ask for 2 to 1000", s.clients)
	case s.processes != 1 && s.processes != 2:
		return s, fmt.Errorf("-processes %d: ask for 1 or 2", s.processes)
	case s.compare && s.processes != 1:
		return s, errors.New("-compare is for -processes 1: others can't have two")
	case s.order != newFirst && s.order != oldFirst:
		return s, fmt.Errorf("-order %q: ask for %s or %s", s.order, newFirst, oldFirst)
	case s.processes == 1 && s.order != newFirst:
		return s, errors.New("-order is for two servers")
	case s.kill < 0:
		return s, fmt.Errorf("-kill %d: ask for 0 or more", s.kill)
	case s.kill > 0 && !child.CanFreeze:
		return s, errors.New("-kill: only Linux tells what a killed server had accepted")
	case flag.NArg() > 0:
		return s, fmt.Errorf("what is %q? see -help", flag.Arg(0))
	}
	return s, nil
}

func main() {
	if addr, ok := os.LookupEnv(addrVariable); ok {
		if os.Getenv(drivenVariable) != "" {
			go func() {
				io.Copy(io.Discard, os.Stdin)
				os.Exit(1)
			}()
		}
		if err := listenAndServe(addr); err != nil {
			fmt.Fprintln(os.Stderr, "restart: server:", err)
			os.Exit(1)
		}
		return
	}

	s, err := parseFlags()
	if err != nil {
		fmt.Fprintln(os.Stderr, "restart:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	runtime.LockOSThread() // a server dies with the thread that started it (child.DieWithParent)
	if err := drive(ctx, s); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "restart:", err)
		os.Exit(1)
	}
}
