//go:build unix && !aix

package lblisten

func init() {
	for name, w := range map[string]func(){
		"outOfDescriptors":       outOfDescriptorsWorker,       // accepts without descriptors, and with them again
		"busyWithoutDescriptors": busyWithoutDescriptorsWorker, // measures the CPU time of loops without descriptors
		"oneError":               oneErrorWorker,               // has many Accepts wait while one gets an error
		"faultServer":            faultServerWorker,            // listens and echoes, until its standard input ends
		"closeOnExec":            closeOnExecWorker,            // looks which descriptors exec leaves open
		"holdNothing":            holdNothingWorker,            // its child: prints the descriptors that it has got
	} {
		workers[name] = w
	}
}
