package lblisten

func init() {
	for name, w := range map[string]func(){
		// In a sandbox: other users, namespaces, privileges.
		"network":      networkWorker,      // sets up a network namespace, and runs another worker there as whom it is told
		"experiment":   experimentWorker,   // two processes stand still, one goes away, the other one accepts
		"holder":       holderWorker,       // one of them
		"rounds":       roundsWorker,       // a process that doesn't accept is killed, twenty times
		"steer":        steerWorker,        // counts the members that each source comes to
		"joinThere":    joinThereWorker,    // listens on another user's address
		"strayKeeper":  strayKeeperWorker,  // keeps a handoff in another network namespace
		"listenThere":  listenThereWorker,  // listens with another user's handoff
		"connectThere": connectThereWorker, // speaks with another user's process
		"diskFull":     diskFullWorker,     // listens with a handoff on a full disk

		// With a filter of system calls, or traced.
		"attach":          attachWorker,          // listens, for strace to count programs
		"killedForBPF":    killedForBPFWorker,    // listens in every mode where bpf(2) kills
		"leftProgram":     leftProgramWorker,     // joins a process that steers, and ends
		"listenCallsFail": listenCallsFailWorker, // has each system call of Listen fail
		"acceptCallFails": acceptCallFailsWorker, // has accept4 fail at random
		"withoutPoll":     withoutPollWorker,     // goes without poll, eventfd2 and the scheduler's calls
		"acceptSyscalls":  acceptSyscallsWorker,  // accepts, for strace to count
	} {
		workers[name] = w
	}
}
