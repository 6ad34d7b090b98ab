// Package promql tries the collector's dashboard, alert rules and documentation with
// Prometheus' own parser and engine. It is a module of its own because these are heavy.
package promql

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/lblisten/lblisten"
	lbprometheus "github.com/lblisten/lblisten/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

// labels returns the labels of every metric that the collector exports, with those
// that Prometheus adds.
func labels(t *testing.T) map[string][]string {
	t.Helper()
	g, err := lblisten.ListenGroup(context.Background(), "tcp4", "127.0.0.1:0", 1)
	require.NoError(t, err)
	defer g.Close()
	ch := make(chan *prometheus.Desc, 20)
	lbprometheus.NewCollector(g).Describe(ch)
	close(ch)
	all := make(map[string][]string)
	for d := range ch {
		m := regexp.MustCompile(`fqName: "(\w+)".*variableLabels: \{([\w,]*)\}`).FindStringSubmatch(d.String())
		require.NotNil(t, m, "%v", d)
		all[m[1]] = append(strings.Split(m[2], ","), "address", "job", "instance", "__name__")
	}
	return all
}

// check parses an expression and tells which metrics it uses. Each must be one
// that the collector exports, and so must be the labels that it goes by.
func check(t *testing.T, exported map[string][]string, expr string) (metrics []string) {
	t.Helper()
	// What Grafana puts there before it asks.
	expr = strings.NewReplacer("$__rate_interval", "5m", "$job", ".*", "$instance", ".*", "$address", ".*").Replace(expr)
	require.NotContains(t, expr, "$")
	e, err := parser.ParseExpr(expr)
	require.NoError(t, err, expr)
	parser.Inspect(e, func(node parser.Node, _ []parser.Node) error {
		if v, ok := node.(*parser.VectorSelector); ok {
			require.Contains(t, exported, v.Name, expr)
			metrics = append(metrics, v.Name)
			for _, m := range v.LabelMatchers {
				require.Contains(t, exported[v.Name], m.Name, expr)
			}
		}
		return nil
	})
	parser.Inspect(e, func(node parser.Node, _ []parser.Node) error {
		if a, ok := node.(*parser.AggregateExpr); ok {
			for _, label := range a.Grouping {
				for _, v := range metrics {
					require.Contains(t, exported[v], label, expr)
				}
			}
		}
		return nil
	})
	require.NotEmpty(t, metrics, expr)
	return metrics
}

// Every panel asks the data source that the user chooses, for metrics that exist,
// and every metric is shown.
func TestDashboard(t *testing.T) {
	type source struct{ Type, UID string }
	var d struct {
		Panels []struct {
			Title      string
			Datasource source
			Targets    []struct {
				Datasource         source
				Expr, LegendFormat string
			}
		}
		Templating struct {
			List []struct {
				Name, Type string
				Datasource source
				Query      any
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(read(t, "../grafana.json")), &d))
	exported, chosen := labels(t), source{"prometheus", "${datasource}"}
	shown := make(map[string]bool)
	for _, p := range d.Panels {
		require.Equal(t, chosen, p.Datasource, p.Title)
		require.NotEmpty(t, p.Targets, p.Title)
		for _, target := range p.Targets {
			require.Equal(t, chosen, target.Datasource, p.Title)
			metrics := check(t, exported, target.Expr)
			for _, m := range metrics {
				shown[m] = true
				for _, label := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
					require.Contains(t, exported[m], label[1], p.Title)
				}
			}
		}
	}
	require.Len(t, shown, len(exported), "%v", shown)
	variables := make(map[string]bool)
	for _, v := range d.Templating.List {
		variables[v.Name] = true
		if v.Type == "datasource" {
			require.Equal(t, "prometheus", v.Query)
			continue
		}
		require.Equal(t, chosen, v.Datasource, v.Name)
		q := v.Query.(map[string]any)["query"].(string)
		m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(q)
		require.NotNil(t, m, q)
		for _, metric := range check(t, exported, m[1]) {
			require.Contains(t, exported[metric], m[2], q)
		}
	}
	require.Equal(t, map[string]bool{"datasource": true, "job": true, "instance": true, "address": true}, variables)
}

// The README's PromQL is about metrics that exist.
func TestReadme(t *testing.T) {
	blocks := regexp.MustCompile("(?s)```promql\n(.*?)```").FindAllStringSubmatch(read(t, "../README.md"), -1)
	require.NotEmpty(t, blocks)
	exported := labels(t)
	for _, b := range blocks {
		for _, line := range strings.Split(strings.TrimSpace(b[1]), "\n") {
			check(t, exported, line)
		}
	}
}

// Each alert fires when it is meant to, and not before. The scripts are those of
// Prometheus' own tests; a series "0+60x9" is 0, 60, 120, ... each minute.
func TestAlerts(t *testing.T) {
	file, errs := rulefmt.Parse([]byte(read(t, "../alerts.yml")), false)
	require.Empty(t, errs)
	exported, exprs, tried := labels(t), make(map[string]string), make(map[string]bool)
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			check(t, exported, r.Expr)
			exprs[r.Alert] = strings.Join(strings.Fields(r.Expr), " ")
		}
	}
	const at = `job="app", address=":80"`
	for _, c := range []struct{ name, alert, load, want string }{ // without want it doesn't fire
		{"a queue that is nearly full", "LblistenQueueNearlyFull",
			`lblisten_queue_length{instance="a", listener="0", ` + at + `} 3600x30
			 lblisten_queue_length{instance="a", listener="1", ` + at + `} 0x30
			 lblisten_backlog{instance="a", listener="0", ` + at + `} 4000x30
			 lblisten_backlog{instance="a", listener="1", ` + at + `} 4000x30`,
			`{instance="a", listener="0", ` + at + `} 0.9`},
		{"queues that aren't", "LblistenQueueNearlyFull",
			`lblisten_queue_length{instance="a", listener="0", ` + at + `} 3200x30
			 lblisten_backlog{instance="a", listener="0", ` + at + `} 4000x30`, ""},
		{"a tenth is inherited", "LblistenInheritsConstantly",
			`lblisten_inherited_total{instance="a", listener="0", ` + at + `} 0+60x30
			 lblisten_accepted_total{instance="a", listener="0", ` + at + `} 0+300x30
			 lblisten_inherited_total{instance="b", listener="0", ` + at + `} 0x30
			 lblisten_accepted_total{instance="b", listener="0", ` + at + `} 0+300x30`,
			`{` + at + `} 1`},
		{"a restart", "LblistenInheritsConstantly",
			`lblisten_inherited_total{instance="a", listener="0", ` + at + `} 0x20 500x10
			 lblisten_accepted_total{instance="a", listener="0", ` + at + `} 0+300x30`, ""},
		{"nothing is accepted at all", "LblistenInheritsConstantly",
			`lblisten_inherited_total{instance="a", listener="0", ` + at + `} 0x30
			 lblisten_accepted_total{instance="a", listener="0", ` + at + `} 0x30`, ""},
		{"a handoff that is lost", "LblistenHandoffLost",
			`lblisten_listener_info{instance="a", on_kill="kernel+handoff", ` + at + `} 1x20
			 lblisten_listener_info{instance="a", on_kill="kernel", ` + at + `} _x20 1x10
			 lblisten_listener_info{instance="b", on_kill="handoff", ` + at + `} 1x30`,
			`{instance="a", ` + at + `} 1`},
		{"a handoff that is back", "LblistenHandoffLost",
			`lblisten_listener_info{instance="a", on_kill="handoff", ` + at + `} 1x10 stale _x10 1x10
			 lblisten_listener_info{instance="a", on_kill="none", ` + at + `} _x10 1x10 stale`, ""},
		{"systemd that keeps nothing any more", "LblistenHandoffLost",
			`lblisten_listener_info{instance="a", on_kill="systemd", ` + at + `} 1x20
			 lblisten_listener_info{instance="a", on_kill="none", ` + at + `} _x20 1x10`,
			`{instance="a", ` + at + `} 1`},
		{"nobody", "LblistenNobodyTakesOver",
			`lblisten_listener_info{instance="a", on_kill="none", ` + at + `} 1x30
			 lblisten_listener_info{instance="b", on_kill="systemd", ` + at + `} 1x30`,
			`{instance="a", ` + at + `} 1`},
		{"who never had one", "LblistenHandoffLost",
			`lblisten_listener_info{instance="a", on_kill="none", ` + at + `} 1x30`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var load []string
			for _, line := range strings.Split(c.load, "\n") {
				load = append(load, "  "+strings.TrimSpace(line))
			}
			script := fmt.Sprintf("load 1m\n%s\n\neval instant at 30m %s\n  %s\n", strings.Join(load, "\n"), exprs[c.alert], c.want)
			engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 10000, Timeout: time.Minute,
				EnableAtModifier: true, EnableNegativeOffset: true}) // RunTest evaluates with them, too
			defer engine.Close()
			promqltest.RunTest(t, script, engine)
		})
		tried[c.alert] = true
	}
	require.Len(t, tried, len(exprs), "alerts that no case is about")
}
