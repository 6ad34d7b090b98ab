package main

// Interleaved measurement, and what is made of the figures.

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// probe is one contender of a table: batch does some of what is measured, and
// returns how much CPU time it took and how often it was done.
type probe struct {
	name  string
	batch func() (cpu time.Duration, n int, err error)
}

// costs are nanoseconds for each time, by probe and block.
type costs [][]float64

// interleave measures all probes in random order, again and again: one batch each,
// because what else the machine does is much the same for some tenths of a second
// only. A block ends when each of them has used perBlock: a cheap one gets more
// batches.
func interleave(probes []probe, blocks int, perBlock time.Duration) (costs, error) {
	all := make(costs, len(probes))
	for range blocks {
		cpu := make([]time.Duration, len(probes))
		n := make([]int, len(probes))
		for round := 0; round == 0 || slices.Min(cpu) < perBlock; round++ {
			for _, i := range rand.Perm(len(probes)) {
				if round > 0 && cpu[i] >= perBlock {
					continue
				}
				took, count, err := probes[i].batch()
				if err != nil {
					return nil, named(probes[i].name, err)
				}
				cpu[i] += took
				n[i] += count
			}
		}
		for i := range probes {
			all[i] = append(all[i], float64(cpu[i].Nanoseconds())/float64(max(1, n[i])))
		}
	}
	return all, nil
}

// ratio is the median of block ratios of two probes.
func (c costs) ratio(a, b int) float64 {
	r := make([]float64, len(c[a]))
	for i := range r {
		r[i] = c[a][i] / c[b][i]
	}
	return median(r)
}

func (c costs) median(i int) float64 { return median(c[i]) }

func (c costs) medians() (all []float64) {
	for i := range c {
		all = append(all, c.median(i))
	}
	return all
}

func median(v []float64) float64 { return quantile(v, 0.5) }

func quantile[T cmp.Ordered](v []T, q float64) T {
	var zero T
	if len(v) == 0 {
		return zero
	}
	s := slices.Sorted(slices.Values(v))
	return s[int(math.Round(q*float64(len(s)-1)))]
}

// exponent is how y grows with x: the slope in log-log by least squares. 1 is
// linear, 0 is constant.
func exponent(x, y []float64) float64 {
	var sx, sy, sxx, sxy, n float64
	for i := range x {
		lx, ly := math.Log(x[i]), math.Log(y[i])
		sx, sy, sxx, sxy, n = sx+lx, sy+ly, sxx+lx*lx, sxy+lx*ly, n+1
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}

func named(name string, err error) error {
	return fmt.Errorf("%s: %w", name, err)
}

// spread shows the least and the greatest block ratio.
func (c costs) spread(a, b int) cell {
	low, high := math.Inf(1), 0.0
	for i := range c[a] {
		low, high = min(low, c[a][i]/c[b][i]), max(high, c[a][i]/c[b][i])
	}
	return cell{text: fmt.Sprintf("%.2f-%.2f", low, high), value: high}
}
