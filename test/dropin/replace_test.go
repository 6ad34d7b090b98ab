package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReplaceListen(t *testing.T) {
	const (
		top  = "package p // a comment\nimport \"net\"\n"
		ours = "package p; import \"github.com/lblisten/lblisten\" // a comment\nimport \"net\"\n"
		used = "\n\nvar _ net.Listener // used, whatever was replaced\n"
	)
	for _, c := range []struct{ name, src, plain, withLB string }{
		{"a call", `func f() { net.Listen("tcp", g(1)) }`,
			`func f() { lblisten.Listen("tcp", g(1)) }`,
			`func f() { lblisten.Listen("tcp", g(1), lblisten.WithLB()) }`},
		{"a value", `var f = net.Listen`,
			`var f = func(network, address string) (net.Listener, error) { return lblisten.Listen(network, address) }`,
			`var f = func(network, address string) (net.Listener, error) { return lblisten.Listen(network, address, lblisten.WithLB()) }`},
		{"a ListenConfig", `func f() { var lc net.ListenConfig; lc.Listen(ctx, n, a) }`,
			`func f() { var lc net.ListenConfig; lblisten.ListenContext(ctx, n, a, lblisten.WithListenConfig(lc)) }`,
			`func f() { var lc net.ListenConfig; lblisten.ListenContext(ctx, n, a, lblisten.WithListenConfig(lc), lblisten.WithLB()) }`},
		{"an assertion", `func f() { l, _ := net.Listen(n, a); l.(*net.TCPListener).File() }`,
			`func f() { l, _ := lblisten.Listen(n, a); l.(*net.TCPListener).File() }`, ""},
		{"another's Listen", `func f() { x.Listen(ctx, n, a); net.ListenPacket(n, a) }`, "", ""},
		{"ListenTCP", `func f() { net.ListenTCP(n, nil) }`, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for options, want := range map[string]string{"": c.plain, "lblisten.WithLB()": c.withLB} {
				got, n, _, err := replaceListen("p.go", []byte(top+c.src), options)
				require.NoError(t, err)
				if want == "" {
					require.Zero(t, n)
					continue
				}
				require.Equal(t, 1, n)
				require.Equal(t, ours+want+used, string(got))
			}
		})
	}
}
