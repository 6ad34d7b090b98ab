//go:build unix && !aix

package lblisten

func init() {
	for name, w := range map[string]func(){
		"server":  serverWorker,  // listens with a handoff, and obeys: a word a line
		"soak":    soakWorker,    // the same for the soak, with listeners that come and go
		"keeper":  keeperWorker,  // keeps a handoff, until SIGTERM
		"web":     webWorker,     // is an HTTP server, until SIGTERM
		"flooded": floodedWorker, // is sent sockets without end by a peer
	} {
		workers[name] = w
	}
}
