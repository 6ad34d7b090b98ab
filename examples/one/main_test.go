package main

import (
	"os"
	"testing"

	"github.com/lblisten/lblisten/examples/internal/exampletest"
)

// workers are what this program is, besides the example, if a variable of the environment
// is set: they are called with its value.
var workers = make(map[string]func(string))

func TestMain(m *testing.M) {
	for variable, work := range workers {
		if value := os.Getenv(variable); value != "" {
			work(value)
			return
		}
	}
	exampletest.Main(m, main)
}
