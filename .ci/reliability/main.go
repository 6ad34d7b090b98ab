// Command reliability puts what the tests counted into the tables of
// docs/reliability.md. It reads the outputs of go test -v that it is given. A row
// that ends in "| tried | lost |" names its tests in backquotes; the tests log
// lines like "2000 tried, 0 lost".
package main

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
)

const doc = "docs/reliability.md"

var (
	starts = regexp.MustCompile(`^=== (?:RUN|NAME|CONT)\s+(Test\w+)`)
	counts = regexp.MustCompile(`\b(\d+) tried, (\d+) lost\b`)
	names  = regexp.MustCompile("`(Test\\w+)`")
	row    = regexp.MustCompile(`^(\|.*\|) [\d ]*\| [\d ]*\|$`)
)

type count struct{ tried, lost int }

func main() {
	sums := map[string]count{}
	for _, file := range os.Args[1:] {
		f, err := os.Open(file)
		check(err)
		test := ""
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<24)
		for lines.Scan() {
			if m := starts.FindStringSubmatch(strings.TrimSpace(lines.Text())); m != nil {
				test = m[1]
			}
			if m := counts.FindStringSubmatch(lines.Text()); m != nil {
				c := sums[test]
				tried, _ := strconv.Atoi(m[1])
				lost, _ := strconv.Atoi(m[2])
				sums[test] = count{c.tried + tried, c.lost + lost}
			}
		}
		check(lines.Err())
		check(f.Close())
	}
	text, err := os.ReadFile(doc)
	check(err)
	out := strings.Split(string(text), "\n")
	total := count{}
	for i, line := range out {
		m := row.FindStringSubmatch(line)
		if m == nil || !names.MatchString(m[1]) {
			continue
		}
		var c count
		for _, name := range names.FindAllStringSubmatch(m[1], -1) {
			n, ok := sums[name[1]]
			if !ok {
				check(fmt.Errorf("%s:%d: %s has counted nothing", doc, i+1, name[1]))
			}
			c = count{c.tried + n.tried, c.lost + n.lost}
		}
		total = count{total.tried + c.tried, total.lost + c.lost}
		out[i] = fmt.Sprintf("%s %d | %d |", m[1], c.tried, c.lost)
	}
	check(os.WriteFile(doc, []byte(strings.Join(out, "\n")), 0o644))
	fmt.Println(total.tried, "tried,", total.lost, "lost")
	for name, c := range sums {
		if !strings.Contains(string(text), "`"+name+"`") {
			fmt.Println("not in the tables:", name, c)
		}
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
