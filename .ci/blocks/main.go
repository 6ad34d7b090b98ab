// Command blocks tries every code block of the Markdown files that it is given:
// Go is compiled, shell is run, unless .ci/run runs the same line, and what is for
// another machine (console) is parsed.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

type block struct {
	at, lang, text string
}

func main() {
	var blocks []block
	for _, file := range os.Args[1:] {
		found, err := read(file)
		check(file, err)
		blocks = append(blocks, found...)
	}
	ci, err := os.ReadFile(".ci/run")
	check(".ci/run", err)
	dir, err := os.MkdirTemp("", "blocks")
	check("", err)
	counts := map[string]int{}
	gos := 0
	for _, b := range blocks {
		counts[b.lang]++
		switch b.lang {
		case "go":
			check(b.at, writeGo(filepath.Join(dir, fmt.Sprint("b", gos)), b))
			gos++
		case "sh":
			check(b.at, run(b, string(ci)))
		case "console":
			check(b.at, parseShell(b))
		case "ini":
			check(b.at, parseINI(b))
		case "text", "yaml", "promql": // drawings; and what tests of their own read
		default:
			check(b.at, fmt.Errorf("a block of %q, which nothing tries", b.lang))
		}
	}
	check("", build(dir))
	check("", os.RemoveAll(dir))
	fmt.Println(len(blocks), "blocks:", counts)
}

func check(at string, err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, strings.TrimPrefix(at+": ", ": ")+err.Error())
		os.Exit(1)
	}
}

func read(file string) (blocks []block, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var in *block
	for i, line := range strings.Split(string(text), "\n") {
		lang, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && in == nil:
			in = &block{at: fmt.Sprintf("%s:%d", file, i+1), lang: lang}
		case fence:
			blocks = append(blocks, *in)
			in = nil
		case in != nil:
			in.text += line + "\n"
		}
	}
	if in != nil {
		return nil, errors.New(in.at + ": the block doesn't end")
	}
	return blocks, nil
}

// imports are those that a block of statements may use.
var imports = []string{"context", "crypto/tls", "errors", "fmt", "log", "log/slog", "net", "net/http", "os", "os/signal", "syscall", "time",
	"github.com/lblisten/lblisten"}

// writeGo makes a package of a block: what isn't a whole file becomes the body of
// a function that knows what servers usually have.
func writeGo(dir string, b block) error {
	text := fmt.Sprintf("//line %s:2\n%s", b.at[:strings.LastIndex(b.at, ":")], b.text)
	if !regexp.MustCompile(`(?m)^package `).MatchString(b.text) {
		var used []string
		for _, path := range imports {
			name := path[strings.LastIndex(path, "/")+1:]
			if regexp.MustCompile(`\b` + name + `\.`).MatchString(b.text + "context. http. net. lblisten.") {
				used = append(used, fmt.Sprintf("import %q", path))
			}
		}
		text = "package block\n" + strings.Join(used, "\n") + `
func _(ctx context.Context, srv *http.Server, g *lblisten.Group, ln net.Listener, err error) error {
	{
` + text + `
	}
	return nil
}
`
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "block.go"), []byte(text), 0o644)
}

// build compiles all packages, in a module that has this one.
func build(dir string) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		return err
	}
	mod = regexp.MustCompile(`(?m)^module .*`).ReplaceAll(mod, []byte("module blocks"))
	mod = fmt.Appendf(mod, "\nrequire github.com/lblisten/lblisten v0.0.0\nreplace github.com/lblisten/lblisten => %s\n", root)
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), mod, 0o644); err != nil {
		return err
	}
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "go.sum"), sum, 0o644); err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-gcflags=-e", "./...")
	cmd.Dir = dir
	out, _ := cmd.CombinedOutput()
	var wrong []string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		// A block shows what to do, and not what comes after it.
		if line := lines.Text(); !strings.HasPrefix(line, "# ") && !strings.Contains(line, " and not used") {
			wrong = append(wrong, line)
		}
	}
	if wrong != nil {
		return errors.New(strings.Join(wrong, "\n"))
	}
	return nil
}

func run(b block, ci string) error {
	for _, line := range strings.Split(strings.TrimSpace(b.text), "\n") {
		line, _, _ = strings.Cut(line, " #")
		line = strings.TrimSpace(line)
		if strings.Contains(ci, line+"\n") || strings.Contains(ci, line+" ") {
			continue
		}
		fmt.Println(b.at, line)
		cmd := exec.Command("bash", "-euc", line)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	return nil
}

func parseShell(b block) error {
	cmd := exec.Command("bash", "-n")
	cmd.Stdin = strings.NewReader(regexp.MustCompile(`(?m)^[#$] `).ReplaceAllString(b.text, ""))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

var iniLine = regexp.MustCompile(`^(#.*|\[[A-Za-z]+\]|[A-Za-z]+=.+|)$`)

func parseINI(b block) error {
	for _, line := range strings.Split(b.text, "\n") {
		if !iniLine.MatchString(line) {
			return fmt.Errorf("not a line of a unit: %q", line)
		}
	}
	return nil
}
