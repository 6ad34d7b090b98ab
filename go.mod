module github.com/lblisten/lblisten

go 1.23.0

require (
	github.com/libp2p/go-reuseport v0.4.0
	golang.org/x/sys v0.35.0
)

require github.com/stretchr/testify v1.11.1 // indirect
