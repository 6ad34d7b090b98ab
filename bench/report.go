package main

// What a table is, how it is judged, and how it is printed and written. It knows
// nothing about how anything is measured.

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// Report is a whole run.
type Report struct {
	Machine Machine  `json:"machine"`
	Quick   bool     `json:"quick,omitempty"`
	Tables  []*Table `json:"tables"`
}

// Machine is where and with what it ran.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Date   string `json:"date"`
	Commit string `json:"commit"`
}

func (m Machine) String() string {
	return fmt.Sprintf("%s, %d cores, %s, %s, %s, commit %s", m.CPU, m.Cores, m.Kernel, m.Go, m.Date, m.Commit)
}

// Table is one comparison.
type Table struct {
	Name    string   `json:"name"`
	About   string   `json:"about"` // what was done
	Key     string   `json:"key"`   // heading of the rows' names
	Columns []string `json:"columns"`
	Rows    []*Row   `json:"rows,omitempty"`
	Notes   []string `json:"notes,omitempty"`
	Skipped string   `json:"skipped,omitempty"` // why it wasn't measured
	Error   string   `json:"error,omitempty"`
	Seconds float64  `json:"seconds"`
	Series  []Series `json:"series,omitempty"` // for plots

	skipped []*Row // shown last
	quick   bool   // times mean nothing
}

// Row is one contender. Cells are what the columns show, Values the same unrounded.
type Row struct {
	Name    string    `json:"name"`
	Cells   []string  `json:"cells,omitempty"`
	Values  []float64 `json:"values,omitempty"`
	Bars    []Bar     `json:"bars,omitempty"`
	Skipped string    `json:"skipped,omitempty"` // why it has no values

	quick bool
}

// Bar is what a row promises: that a value is at most, or exactly, a limit.
type Bar struct {
	What  string  `json:"what"`
	Value float64 `json:"value"`
	Limit float64 `json:"limit"`
	Exact bool    `json:"exact,omitempty"` // counts, which don't depend on time
	Met   bool    `json:"met"`

	Unjudged bool `json:"unjudged,omitempty"` // a time of a quick run
}

// Series is a line of a plot.
type Series struct {
	Name string    `json:"name"`
	X    []float64 `json:"x"`
	Y    []float64 `json:"y"`
}

// row adds a row; each value has its format.
func (t *Table) row(name string, values ...cell) *Row {
	r := &Row{Name: name, quick: t.quick}
	for _, v := range values {
		r.Cells = append(r.Cells, v.text)
		r.Values = append(r.Values, v.value)
	}
	t.Rows = append(t.Rows, r)
	return r
}

// skip adds a row of what couldn't be measured, after all others.
func (t *Table) skip(name string, why error) {
	t.skipped = append(t.skipped, &Row{Name: name, Skipped: why.Error()})
}

// cell is a number and how it is shown.
type cell struct {
	text  string
	value float64
}

func num(format string, v float64) cell { return cell{fmt.Sprintf(format, v), v} }

// atMost judges a value by a bar.
func (r *Row) atMost(what string, value, limit float64) {
	r.Bars = append(r.Bars, Bar{What: what, Value: value, Limit: limit, Met: value <= limit, Unjudged: r.quick})
}

// exactly judges a count.
func (r *Row) exactly(what string, value, limit float64) {
	r.Bars = append(r.Bars, Bar{What: what, Value: value, Limit: limit, Exact: true, Met: value == limit})
}

func (b Bar) limit() string {
	if b.Exact {
		return fmt.Sprintf("%s = %.4g", b.What, b.Limit)
	}
	return fmt.Sprintf("%s <= %.4g", b.What, b.Limit)
}

func (b Bar) verdict() string {
	switch {
	case b.Unjudged:
		return "not judged"
	case b.Met:
		return "met"
	}
	return "missed"
}

// bars collects what is judged in any table.
func (r *Report) bars() *Table {
	all := &Table{Name: "Bars", Key: "table", Columns: []string{"row", "bar", "in this run", "verdict"},
		About: "All bars of this run, from the tables below."}
	for _, t := range r.Tables {
		for _, row := range t.Rows {
			for _, b := range row.Bars {
				all.row(t.Name, cell{text: row.Name}, cell{text: b.limit()}, num("%.4g", b.Value), cell{text: b.verdict()})
			}
		}
	}
	return all
}

// failed tells what no run may have: errors, and exact counts that are off. A
// missed time is no failure, since machines differ.
func (r *Report) failed() error {
	var errs []error
	for _, t := range r.Tables {
		if t.Error != "" {
			errs = append(errs, fmt.Errorf("%s: %s", t.Name, t.Error))
		}
		for _, row := range t.Rows {
			for _, b := range row.Bars {
				if b.Exact && !b.Met {
					errs = append(errs, fmt.Errorf("%s, %s: %s, and it is %.4g", t.Name, row.Name, b.limit(), b.Value))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// grid is the table as text: a heading and rows of one length.
func (t *Table) grid() [][]string {
	judged := false
	for _, r := range t.Rows {
		judged = judged || len(r.Bars) > 0
	}
	head := append([]string{t.Key}, t.Columns...)
	if judged {
		head = append(head, "bar", "verdict")
	}
	grid := [][]string{head}
	for _, r := range t.Rows {
		line := append([]string{r.Name}, r.Cells...)
		if r.Skipped != "" {
			line = append(line, "not measured: "+r.Skipped)
		}
		for len(line) < 1+len(t.Columns) {
			line = append(line, "")
		}
		if judged {
			var limits, verdicts []string
			for _, b := range r.Bars {
				limits = append(limits, b.limit())
				verdicts = append(verdicts, b.verdict())
			}
			line = append(line, strings.Join(limits, "; "), strings.Join(verdicts, "; "))
		}
		grid = append(grid, line)
	}
	return grid
}

// text is for terminals.
func (t *Table) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", t.Name)
	if t.Seconds > 0 {
		fmt.Fprintf(&b, " (%.0f s)", t.Seconds)
	}
	b.WriteString("\n")
	if len(t.Rows) > 0 {
		grid := t.grid()
		width := make([]int, len(grid[0]))
		for _, line := range grid {
			for i, s := range line {
				// A reason may be long; it doesn't make its column wide.
				if !strings.HasPrefix(s, "not measured") {
					width[i] = max(width[i], utf8.RuneCountInString(s))
				}
			}
		}
		for _, line := range grid {
			var l strings.Builder
			for i, s := range line {
				l.WriteString("  " + s + strings.Repeat(" ", max(0, width[i]-utf8.RuneCountInString(s))))
			}
			b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
		}
	}
	for _, n := range t.Notes {
		b.WriteString("  " + n + "\n")
	}
	if t.Skipped != "" {
		b.WriteString("  not measured: " + t.Skipped + "\n")
	}
	if t.Error != "" {
		b.WriteString("  ERROR: " + t.Error + "\n")
	}
	return b.String()
}

// markdown is for docs/performance.
func (t *Table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n%s\n\n", t.Name, t.About)
	if len(t.Rows) > 0 {
		for i, line := range t.grid() {
			for j, s := range line {
				s = strings.ReplaceAll(strings.ReplaceAll(s, "|", `\|`), "<=", "≤")
				if j == 0 && strings.HasPrefix(s, "lblisten") {
					s = "**" + s + "**"
				}
				if s == "missed" {
					s = "**missed**"
				}
				b.WriteString("| " + s + " ")
			}
			b.WriteString("|\n")
			if i == 0 {
				b.WriteString("|---" + strings.Repeat("|---", len(line)-1) + "|\n")
			}
		}
		b.WriteString("\n")
	}
	for _, n := range t.Notes {
		b.WriteString(n + "\n\n")
	}
	if t.Skipped != "" {
		b.WriteString("Not measured: " + t.Skipped + "\n\n")
	}
	if t.Error != "" {
		b.WriteString("Error: " + t.Error + "\n\n")
	}
	return b.String()
}

// pictures says under which table which plot is shown.
var pictures = []struct {
	table, file, caption string
	draw                 func(*Table, string) error
}{
	{"AcceptInterleaved", "accept.svg", "What an accept costs", plotAccept},
	{"Live", "live.svg", "What a whole connection costs", plotLive},
	{"Stall", "stall.svg", "What happens to latency when one of four listeners stalls", plotStall},
	{"Members", "members.svg", "Cost by number of members", plotMembers},
	{"Goroutines", "goroutines.svg", "Cost by number of accepting goroutines", plotGoroutines},
	{"Processes", "processes.svg", "Time of Listen by number of processes", plotProcesses},
	{"Restart", "restart.svg", "Failed requests of restarts", plotRestart},
}

// write makes README.md, results.json and the plots.
func (r *Report) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var b strings.Builder
	m := r.Machine
	b.WriteString("# Performance\n\nWritten by `go -C bench run .`, which anybody can run; don't edit it. [results.json](results.json) has the same unrounded. " +
		"Two tables need tools: `apt-get install strace wrk`.\n\n")
	if r.Quick {
		b.WriteString("**A quick run: times in it mean nothing.**\n\n")
	}
	b.WriteString("| machine | kernel | Go | date | commit |\n|---|---|---|---|---|\n")
	fmt.Fprintf(&b, "| %s, %d cores | %s | %s | %s | %s |\n\n", m.CPU, m.Cores, m.Kernel, m.Go, m.Date, m.Commit)
	b.WriteString("Ratios are medians over blocks; in every block all rows of a table are measured in random order, so that what else the machine does hits all alike. ")
	b.WriteString("Connections per second and the tails of latency repeat badly on a machine with few cores; CPU times and counts repeat well, so these have bars.\n\n")
	b.WriteString(r.bars().markdown())
	for _, t := range r.Tables {
		b.WriteString(t.markdown())
		for _, p := range pictures {
			if p.table != t.Name || len(t.Rows) == 0 || t.Error != "" {
				continue
			}
			if err := p.draw(t, filepath.Join(dir, p.file)); err != nil {
				return fmt.Errorf("%s: %w", p.file, err)
			}
			fmt.Fprintf(&b, "![%s](%s)\n\n", p.caption, p.file)
		}
	}
	text := strings.TrimRight(b.String(), "\n") + "\n"
	if err := os.WriteFile(filepath.Join(dir, "README.md"), []byte(text), 0o644); err != nil {
		return err
	}
	j, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.json"), append(j, '\n'), 0o644)
}
