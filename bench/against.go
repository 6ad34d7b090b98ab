package main

// Two versions of the package, measured in turn by the same suite: what a change costs.

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// against measures a table with the package as it is here and as it was at a commit, so
// many times in turn, and prints for each value of each row both medians and their ratio.
func against(commit, only string, times int) error {
	dir, err := os.MkdirTemp("", "lblisten-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tree := filepath.Join(dir, "before")
	if err := command("git", "worktree", "add", "--detach", tree, commit); err != nil {
		return err
	}
	defer command("git", "worktree", "remove", "--force", tree)
	// The suite of now, beside the package of then.
	if err := os.RemoveAll(filepath.Join(tree, "bench")); err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(tree, "bench"), os.DirFS(".")); err != nil {
		return err
	}
	programs := map[string]string{"before": filepath.Join(dir, "bench-before"), "now": filepath.Join(dir, "bench-now")}
	trees := map[string]string{"before": filepath.Join(tree, "bench"), "now": "."}
	for name, in := range trees {
		if err := command("go", "build", "-C", in, "-o", programs[name], "."); err != nil {
			return fmt.Errorf("building %s: %w", name, err)
		}
	}
	values := map[string]map[string][][]float64{"before": {}, "now": {}} // by version and row: values of each run
	var rows []string
	var columns []string
	for i := range times {
		order := []string{"before", "now"}
		if rand.IntN(2) == 0 {
			slices.Reverse(order)
		}
		for _, name := range order {
			out := filepath.Join(dir, fmt.Sprint(name, i))
			run := exec.Command(programs[name], "-only", only, "-out", out)
			run.Dir = trees[name]
			if text, err := run.CombinedOutput(); err != nil && !fileExists(filepath.Join(out, "results.json")) {
				return fmt.Errorf("%s: %w: %s", name, err, text)
			}
			var r Report
			b, err := os.ReadFile(filepath.Join(out, "results.json"))
			if err == nil {
				err = json.Unmarshal(b, &r)
			}
			if err != nil {
				return err
			}
			for _, t := range r.Tables {
				columns = t.Columns
				for _, row := range t.Rows {
					if len(row.Values) == 0 {
						continue
					}
					if !slices.Contains(rows, row.Name) {
						rows = append(rows, row.Name)
					}
					values[name][row.Name] = append(values[name][row.Name], row.Values)
				}
			}
			fmt.Printf("%d of %d: %s\n", i+1, times, name)
		}
	}
	t := &Table{Name: only, Key: "row", Columns: []string{"value", "at " + commit, "now", "now / then"},
		About: fmt.Sprintf("Medians of %d runs of each version, in turn and in random order.", times)}
	for _, name := range rows {
		before, now := values["before"][name], values["now"][name]
		for c, column := range columns {
			a, b := medianOf(before, c), medianOf(now, c)
			if a == 0 && b == 0 {
				continue
			}
			t.row(name, cell{column, 0}, num("%.4g", a), num("%.4g", b), num("%.3f", b/a))
		}
	}
	fmt.Printf("\n%s", t.text())
	return nil
}

// medianOf returns the median of one value of some runs; 0 if they don't have it.
func medianOf(runs [][]float64, c int) float64 {
	var all []float64
	for _, r := range runs {
		if c < len(r) {
			all = append(all, r[c])
		}
	}
	if all == nil {
		return 0
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func command(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
