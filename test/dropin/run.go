package main

// Running a suite: a copy of the module, its variants as overlays, and what go test says.

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// A variant is what takes the place of net.Listen.
type variant string

const (
	asItIs variant = "as it is"
	plain  variant = "Listen"
	withLB variant = "WithLB"
)

// A tree is a module's copy. Its variants have the same go.mod, and differ in what
// go test's overlay puts in the place of its files.
type tree struct {
	suite
	dir      string
	overlays string // where they are
}

// fetch makes the copy, and has it require this repository.
func (t tree) fetch() error {
	repository, err := output(".", "go", "list", "-m", "-f", "{{.Dir}}", ourPath)
	if err != nil {
		return err
	}
	text, err := output(os.TempDir(), "go", "mod", "download", "-json", t.module+"@"+t.version)
	if err != nil {
		return err
	}
	var m struct{ Dir string }
	if err := json.Unmarshal(text, &m); err != nil {
		return err
	}
	if err := os.CopyFS(t.dir, os.DirFS(m.Dir)); err != nil {
		return err
	}
	replacement := ourPath + "=" + strings.TrimSpace(string(repository))
	if _, err := output(t.dir, "go", "mod", "edit", "-require", ourPath+"@v0.0.0", "-replace", replacement); err != nil {
		return err
	}
	_, err = output(t.dir, "go", "get", ourPath+"@v0.0.0")
	return err
}

// replace writes the overlay of a variant, and returns how many places it has changed.
func (t tree) replace(v variant) (int, error) {
	options := ""
	if v == withLB {
		options = "lblisten.WithLB()"
	}
	total, files := 0, map[string]string{}
	err := filepath.WalkDir(t.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.Contains(path, "testdata") {
			return err
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(t.dir, path)
		out, n, left, err := replaceListen(name, src, options)
		if err != nil {
			return err
		}
		for _, l := range left {
			fmt.Printf("%s: left alone: %s\n", v, l)
		}
		if n == 0 {
			return nil
		}
		total += n
		files[path] = filepath.Join(t.overlays, fmt.Sprintf("%s%d.go", v, len(files)))
		return os.WriteFile(files[path], out, 0o644)
	})
	if err != nil {
		return 0, err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": files})
	if err != nil {
		return 0, err
	}
	return total, os.WriteFile(t.overlay(v), overlay, 0o644)
}

func (t tree) overlay(v variant) string { return filepath.Join(t.overlays, string(v)+".json") }

// A test is one of a package; the empty name is the package itself.
type test struct{ pkg, name string }

func (t test) String() string { return strings.TrimSpace(t.pkg + " " + t.name) }

// A report is what became of the tests of a run.
type report struct {
	result map[test]string // "pass", "fail" or "skip"
	fails  map[test]int    // with -count, how often
	output map[test]string
}

func (r report) String() string {
	n := map[string]int{}
	for t, result := range r.result {
		if t.name != "" {
			n[result]++
		}
	}
	return fmt.Sprintf("%d/%d/%d", n["pass"], n["fail"], n["skip"])
}

// print prints the failed tests.
func (r report) print(what string, verbose bool) {
	for t, result := range r.result {
		if result == "fail" {
			fmt.Printf("%s: %s\n", what, t)
			if verbose {
				fmt.Print(r.output[t])
			}
		}
	}
}

// test runs the suite in a variant, with more arguments for go test.
func (t tree) test(v variant, more ...string) (report, error) {
	args := []string{"test", "-json", "-vet=off", "-count=1", "-timeout=10m"}
	if v != asItIs {
		args = append(args, "-overlay", t.overlay(v))
	}
	if t.run != "" {
		args = append(args, "-run", t.run)
	}
	if t.skip != "" {
		args = append(args, "-skip", t.skip)
	}
	if more == nil {
		more = t.packages
	}
	start := time.Now()
	text, err := output(t.dir, "go", append(args, more...)...)
	if e := (*exec.ExitError)(nil); err != nil && !errors.As(err, &e) {
		return report{}, err
	}
	r, perr := parse(text)
	if perr != nil || len(r.result) == 0 {
		return report{}, cmp.Or(err, perr, errors.New("no tests"))
	}
	fmt.Printf("%s: %s in %.0f s\n", v, r, time.Since(start).Seconds())
	return r, nil
}

// parse reads what go test -json has printed.
func parse(text []byte) (report, error) {
	r := report{map[test]string{}, map[test]int{}, map[test]string{}}
	for d := json.NewDecoder(bytes.NewReader(text)); d.More(); {
		var e struct{ Action, Package, ImportPath, Test, Output string }
		if err := d.Decode(&e); err != nil {
			return r, err
		}
		t := test{e.Package, e.Test}
		switch e.Action {
		case "output":
			r.output[t] += e.Output
		case "build-output":
			pkg, _, _ := strings.Cut(e.ImportPath, " ")
			r.output[test{pkg, ""}] += e.Output
		case "pass", "skip", "fail":
			if r.result[t] != "fail" {
				r.result[t] = e.Action
			}
			if e.Action == "fail" {
				r.fails[t]++
			}
		}
	}
	return r, nil
}

// compare looks at the tests that pass as they are and not in a variant. It runs each
// 20 times more both ways, and returns how many fail in the variant only.
func (t tree) compare(before, after report, v variant, verbose bool) (int, error) {
	faults := 0
	for _, name := range worse(before, after) {
		if v == withLB && t.conflicts != "" && regexp.MustCompile(t.conflicts).MatchString(name.name) {
			fmt.Printf("%s: fails as it must, because it expects EADDRINUSE: %s\n", v, name)
			continue
		}
		fmt.Printf("%s: passes as it is, but here: %s\n", v, cmp.Or(after.result[name], "isn't run"))
		fmt.Printf("%s: %s\n", v, name)
		if verbose {
			fmt.Print(after.output[name])
		}
		top, _, _ := strings.Cut(name.name, "/")
		again := []string{"-count=20", "-run", "^" + regexp.QuoteMeta(top) + "$", name.pkg}
		if name.name == "" {
			again = []string{"-count=20", name.pkg}
		}
		control, err := t.test(asItIs, again...)
		if err != nil {
			return 0, err
		}
		ours, err := t.test(v, again...)
		if err != nil {
			return 0, err
		}
		fmt.Printf("%s: %s: again, 20 times: %d failed as it is, %d here\n", v, name, control.fails[name], ours.fails[name])
		if control.fails[name] == 0 && ours.fails[name] > 0 {
			faults++
		}
	}
	return faults, nil
}

// worse returns the tests that passed before and not after. Of a test and its subtests it
// is the test; of a package without failed tests, the package.
func worse(before, after report) []test {
	var w []test
	for t, result := range before.result {
		top := !strings.Contains(t.name, "/")
		if top && t.name != "" && result == "pass" && after.result[t] != "pass" {
			w = append(w, t)
		}
	}
	for t, result := range before.result {
		if t.name == "" && result == "pass" && after.result[t] == "fail" &&
			!slices.ContainsFunc(w, func(o test) bool { return o.pkg == t.pkg }) {
			w = append(w, t)
		}
	}
	slices.SortFunc(w, func(a, b test) int { return cmp.Compare(a.String(), b.String()) })
	return w
}

// output runs a command in a directory, and returns what it has printed.
func output(dir, name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", cmd, err, &stderr)
	}
	return out, err
}
