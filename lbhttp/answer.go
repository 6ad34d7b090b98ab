package lbhttp

import (
	"bufio"
	"io"
	"net"
	"net/http"
)

// An answer tells its client that the connection ends, by "Connection: close", of which
// net/http makes a GOAWAY in HTTP/2. It says so with the header of the answer itself: in
// one of status 1xx, clients take it for the end of the connection.
type answer struct {
	http.ResponseWriter
	told bool
}

// serveLast has a handler answer the last request of a connection.
func serveLast(h http.Handler, w http.ResponseWriter, r *http.Request) {
	a := &answer{ResponseWriter: w}
	if _, ok := w.(http.Hijacker); ok {
		h.ServeHTTP(hijacker{a}, r)
	} else {
		h.ServeHTTP(pusher{a}, r)
	}
	a.tell() // it may be empty
}

func (a *answer) tell() {
	if !a.told {
		a.told = true
		a.Header().Set("Connection", "close")
	}
}

func (a *answer) WriteHeader(status int) {
	if status >= 200 {
		a.tell()
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.tell()
	return a.ResponseWriter.Write(b)
}

func (a *answer) WriteString(s string) (int, error) {
	a.tell()
	return io.WriteString(a.ResponseWriter, s)
}

func (a *answer) ReadFrom(r io.Reader) (int64, error) {
	a.tell()
	return io.Copy(a.ResponseWriter, r)
}

func (a *answer) FlushError() error {
	a.tell()
	return http.NewResponseController(a.ResponseWriter).Flush()
}

func (a *answer) Flush() { a.FlushError() }

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// CloseNotify is deprecated, and still called by frameworks that don't ask whether it is there.
func (a *answer) CloseNotify() <-chan bool {
	return a.ResponseWriter.(http.CloseNotifier).CloseNotify() //lint:ignore SA1019 see above
}

// A hijacker is an answer of HTTP/1.
type hijacker struct{ *answer }

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.ResponseWriter.(http.Hijacker).Hijack()
}

// A pusher is an answer of HTTP/2.
type pusher struct{ *answer }

func (p pusher) Push(target string, opts *http.PushOptions) error {
	if w, ok := p.ResponseWriter.(http.Pusher); ok {
		return w.Push(target, opts)
	}
	return http.ErrNotSupported
}
