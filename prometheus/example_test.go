package lbprometheus_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/lblisten/lblisten"
	lbprometheus "github.com/lblisten/lblisten/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A server that tells Prometheus of its group as long as that is open.
func ExampleNewCollector() {
	ctx, srv := context.Background(), &http.Server{}

	serve := func() error {
		g, err := lblisten.ListenGroup(ctx, "tcp", "127.0.0.1:0", 4)
		if err != nil {
			return err
		}
		c := lbprometheus.NewCollector(g)
		if err := prometheus.Register(c); err != nil {
			g.Close()
			return err
		}
		defer prometheus.Unregister(c)
		http.Handle("/metrics", promhttp.Handler())
		return g.Serve(srv.Serve)
	}

	srv.Close() // so that the example ends
	fmt.Println(errors.Is(serve(), http.ErrServerClosed))
	// Output: true
}

// Two listeners of one address are told apart by a label.
func ExampleNewCollector_sameAddress() {
	reg := prometheus.NewRegistry()

	listen := func(address, role string) (net.Listener, error) {
		ln, err := lblisten.Listen("tcp", address, lblisten.WithLB())
		if err != nil {
			return nil, err
		}
		labels := prometheus.Labels{"role": role}
		c := lbprometheus.NewCollector(ln.(*lblisten.Listener))
		if err := prometheus.WrapRegistererWith(labels, reg).Register(c); err != nil {
			ln.Close()
			return nil, err
		}
		return ln, nil
	}

	public, err := listen("127.0.0.1:0", "public")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer public.Close()
	admin, err := listen(public.Addr().String(), "admin")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer admin.Close()
	fmt.Println(admin.Addr().String() == public.Addr().String())
	// Output: true
}
