//go:build !race

package lblisten

const raceDetector = false
