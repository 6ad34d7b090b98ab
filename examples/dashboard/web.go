package main

// The page and what it asks for. It can kill processes, so it answers to itself
// only: no other site's page, nor a name that was made to point here.

import (
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

//go:embed web
var web embed.FS

func (d *dashboard) handler() http.Handler {
	files, err := fs.Sub(web, "web")
	if err != nil {
		panic(err) // it is embedded
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(files))
	mux.HandleFunc("GET /state", d.serveState)
	mux.HandleFunc("GET /events", d.serveEvents)
	mux.HandleFunc("POST /orders", d.serveOrder)
	return d.guard(mux)
}

// guard refuses what doesn't come from the page itself.
func (d *dashboard) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "+
			"base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		switch {
		case !d.isOurName(r.Host):
			http.Error(w, "this host is not known here", http.StatusForbidden)
		case r.Method != http.MethodGet && r.Method != http.MethodHead && !sameOrigin(r):
			http.Error(w, "this page takes orders from itself only", http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// isOurName tells whether a Host header names this server by an address, which no
// other site can have, by localhost, or by the name it was started with.
func (d *dashboard) isOurName(hostport string) bool {
	host := hostOf(hostport)
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return host == "localhost" || host != "" && host == hostOf(d.http)
}

func hostOf(hostport string) string {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	return strings.ToLower(strings.Trim(host, "[]"))
}

// sameOrigin tells whether a request comes from the page, or from no page at all:
// browsers send at least one of the headers with what a page posts.
func sameOrigin(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" {
		return false
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host == r.Host
}

func (d *dashboard) serveState(w http.ResponseWriter, r *http.Request) {
	text, _ := d.latest()
	w.Header().Set("Content-Type", "application/json")
	w.Write(text)
}

// serveEvents sends the state whenever it changes, until the client goes or the
// dashboard ends.
func (d *dashboard) serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	c := http.NewResponseController(w)
	for {
		text, changed := d.latest()
		c.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintf(w, "retry: 1000\ndata: %s\n\n", text); err != nil {
			return
		}
		if err := c.Flush(); err != nil {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// serveOrder answers when the order is obeyed.
func (d *dashboard) serveOrder(w http.ResponseWriter, r *http.Request) {
	var o order
	in := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1000))
	in.DisallowUnknownFields()
	if err := in.Decode(&o); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	o.done = make(chan error, 1)
	select {
	case d.orders <- o:
	case <-r.Context().Done():
		return
	}
	select {
	case err := <-o.done:
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case <-r.Context().Done():
	}
}
