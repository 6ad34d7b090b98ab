//go:build !race

package lbhttp

const raceDetector = false
