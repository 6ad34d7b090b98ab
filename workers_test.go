package lblisten

// workers are parts of tests that run in processes of their own: this program,
// started again with the worker's name in the environment variable
// LBLISTEN_TEST_WORKER. What a worker needs to know is in other variables; it says
// what it has found by its output, and that something is wrong by a panic.
// workers_*_test.go have those of some systems only.
var workers = map[string]func(){
	"flowKey": flowKeyWorker, // prints the key of a flow
}
