//go:build !freebsd

package joining

// Refuses is false: no other kernel that balances gives it a share.
func Refuses() bool { return false }

// TurnedAway is false.
func TurnedAway(error) bool { return false }
