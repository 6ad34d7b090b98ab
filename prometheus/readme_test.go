package lbprometheus

import (
	_ "embed"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

var (
	//go:embed README.md
	readme string
	//go:embed example_test.go
	examples string
)

// The README's Go is code of the examples, which compile and run.
func TestReadmeCompiles(t *testing.T) {
	dedented := strings.ReplaceAll(examples, "\n\t\t", "\n")
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(readme, -1)
	require.NotEmpty(t, blocks)
	for _, b := range blocks {
		require.Contains(t, dedented, b[1])
	}
}

// The README's table has every metric with its labels, and no other.
func TestReadmeHasEveryMetric(t *testing.T) {
	told := make(map[string][]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `(lblisten_\\w+)` \\|[^|]*\\|([^|]*)\\|").FindAllStringSubmatch(readme, -1) {
		told[row[1]] = strings.Split(strings.Trim(strings.ReplaceAll(row[2], "`", ""), " "), ", ")
	}
	ch := make(chan *prometheus.Desc, 20)
	NewCollector(open(t, 1, "tcp4", "127.0.0.1:0")).Describe(ch)
	close(ch)
	exported := make(map[string][]string)
	for d := range ch {
		m := regexp.MustCompile(`fqName: "(\w+)".*variableLabels: \{([\w,]*)\}`).FindStringSubmatch(d.String())
		require.NotNil(t, m, "%v", d)
		exported[m[1]] = append([]string{"address"}, strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' })...)
	}
	require.Equal(t, exported, told)
}
