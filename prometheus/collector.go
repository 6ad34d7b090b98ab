// Package lbprometheus tells Prometheus what the groups and listeners of package
// lblisten count, and what is in force for them.
package lbprometheus

import (
	"net"
	"strconv"
	"strings"

	"github.com/lblisten/lblisten"
	"github.com/prometheus/client_golang/prometheus"
)

// A Source is what a collector reads: a [*lblisten.Group], or a
// [*lblisten.Listener].
type Source interface {
	Addr() net.Addr
	Info() lblisten.Info
	Stats() lblisten.Stats
}

var (
	_ Source = (*lblisten.Group)(nil)
	_ Source = (*lblisten.Listener)(nil)
)

// shared is the label of sockets that no listener of the collector owns.
const shared = "shared"

type collector struct {
	src       Source
	listeners []*lblisten.Listener // of src, if that is a group

	accepted, inherited, queue, backlog, members, sockets, info *prometheus.Desc
}

// NewCollector returns a collector of one group, or of one listener that was
// opened alone. Every metric has the label address.
//
//   - lblisten_accepted_total and lblisten_inherited_total count connections for
//     each listener. The label listener is its index in [lblisten.Group.Listeners],
//     "0" if it was opened alone.
//   - lblisten_queue_length and lblisten_backlog are connections too. The label is
//     "shared" for sockets that none of the listeners owns: the dispatcher's, and
//     those that closed listeners have left. Where the system doesn't tell, they are
//     left out.
//   - lblisten_members and lblisten_sockets are those of the address in this process.
//   - lblisten_listener_info is 1, with the labels balancer, steering, on_close and
//     on_kill.
//
// A scrape reads what it needs from the kernel, which is a few system calls for
// each socket. The collector keeps nothing open and starts nothing.
//
// When no listener of the address is left in the process, the counters stay what
// they were, members and sockets are 0, and the rest is left out. Whoever closes a group for good
// unregisters its collector, with [prometheus.Registerer.Unregister]; a new group
// of the same address can be registered then, and counts from 0.
//
// Two collectors of one address in a registry are refused with a
// [prometheus.AlreadyRegisteredError]. To have both, register each by
// [prometheus.WrapRegistererWith] and a label that tells them apart.
func NewCollector(src Source) prometheus.Collector {
	// A unix socket's path can be any bytes; a label can't.
	address := prometheus.Labels{"address": strings.ToValidUTF8(src.Addr().String(), "\uFFFD")}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("lblisten_"+name, help, labels, address)
	}
	c := &collector{
		src:       src,
		accepted:  desc("accepted_total", "Connections that Accept has returned.", "listener"),
		inherited: desc("inherited_total", "Those of the accepted connections that came through the socket of a closed listener or a process that is gone.", "listener"),
		queue:     desc("queue_length", "Connections that wait in the kernel for Accept.", "listener"),
		backlog:   desc("backlog", "Connections that can wait in the kernel for Accept.", "listener"),
		members:   desc("members", "Listeners of the address in this process."),
		sockets:   desc("sockets", "Listening sockets of the address in this process."),
		info:      desc("listener_info", "Who balances, by what, and who would inherit the queue if the listener closed or the process were killed now.", "balancer", "steering", "on_close", "on_kill"),
	}
	if g, ok := src.(interface{ Listeners() []*lblisten.Listener }); ok {
		c.listeners = g.Listeners()
	}
	return c
}

// Describe implements [prometheus.Collector].
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.accepted, c.inherited, c.queue, c.backlog, c.members, c.sockets, c.info} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	queue := func(s lblisten.Stats, listener string) {
		gauge(c.queue, s.Queued, listener)
		gauge(c.backlog, s.Backlog, listener)
	}
	// The sum is read last: what closes meanwhile isn't taken for a shared socket then.
	info := c.src.Info()
	var each []lblisten.Stats
	for _, l := range c.listeners {
		each = append(each, l.Stats())
	}
	rest := c.src.Stats()
	if c.listeners == nil {
		each = append(each, rest)
	}
	for i, s := range each {
		listener := strconv.Itoa(i)
		ch <- prometheus.MustNewConstMetric(c.accepted, prometheus.CounterValue, float64(s.Accepted), listener)
		ch <- prometheus.MustNewConstMetric(c.inherited, prometheus.CounterValue, float64(s.Inherited), listener)
		// The dispatcher's socket is everybody's. A backlog is 0 when the listener
		// is closed, and -1 where the system doesn't tell.
		if info.Balancer == lblisten.BalancerKernel && s.Backlog > 0 {
			queue(s, listener)
			rest.Queued -= s.Queued
			rest.Backlog -= s.Backlog
		}
	}
	if rest.Backlog > 0 {
		rest.Queued = max(0, rest.Queued) // some were accepted meanwhile
		queue(rest, shared)
	}
	gauge(c.members, info.Members)
	gauge(c.sockets, info.Sockets)
	if info.Balancer != lblisten.BalancerNone {
		gauge(c.info, 1, info.Balancer.String(), info.Steering.String(), info.OnClose.String(), info.OnKill.String())
	}
}
