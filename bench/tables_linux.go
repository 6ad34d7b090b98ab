package main

// The tables, in the order in which they are measured and shown.

var unsupported error

var measurements = []measurement{
	{"Syscalls", measureSyscalls},                   // syscalls_linux.go
	{"Accept", measureAccept},                       // accept_linux.go
	{"AcceptInterleaved", measureAcceptInterleaved}, // accept_linux.go
	{"FastPath", measureFastPath},                   // accept_linux.go
	{"Accept4", measureAccept4},                     // accept_linux.go
	{"Live", measureLive},                           // live_linux.go
	{"DispatchOverhead", measureDispatchOverhead},   // dispatch_linux.go
	{"DispatchLive", measureDispatchLive},           // live_linux.go
	{"Stall", measureStall},                         // stall_linux.go
	{"Members", measureMembers},                     // size_linux.go
	{"Goroutines", measureGoroutines},               // size_linux.go
	{"Churn", measureChurn},                         // size_linux.go
	{"Idle", measureIdle},                           // idle_linux.go
	{"Processes", measureProcesses},                 // processes_linux.go
	{"TakeOver", measureTakeOver},                   // processes_linux.go
	{"ScaleDown", measureScaleDown},                 // scale_linux.go
	{"Restart", measureRestart},                     // restart_linux.go
	{"HTTP", measureHTTP},                           // http_linux.go
}
