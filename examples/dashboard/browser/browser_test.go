// Package browser tries the dashboard's page in a real browser.
package browser

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

// slow is what time limits are multiplied by, as in the package's own tests.
var slow = func() float64 {
	f, err := strconv.ParseFloat(os.Getenv("LBLISTEN_TEST_SLOW"), 64)
	if err != nil || f < 1 {
		return 1
	}
	return f
}()

func limit(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }

// chromium returns the path of the browser.
func chromium(t *testing.T) string {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("no Chromium is installed (Debian: apt-get install chromium)")
	return ""
}

// dashboard starts the dashboard and returns the address of its page.
func dashboard(t *testing.T) string {
	exe := filepath.Join(t.TempDir(), "dashboard")
	build := exec.Command("go", "build", "-o", exe, ".")
	build.Dir = ".."
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	cmd := exec.Command(exe, "-http", "127.0.0.1:0", "-rate", "200")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		require.NoError(t, cmd.Wait())
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	return strings.Fields(line)[1]
}

// complaints is what the page writes to the console as an error, or throws.
type complaints struct {
	mu   sync.Mutex
	list []string
}

func (c *complaints) hear(event any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch e := event.(type) {
	case *runtime.EventExceptionThrown:
		c.list = append(c.list, e.ExceptionDetails.Error())
	case *runtime.EventConsoleAPICalled:
		if e.Type == runtime.APITypeError || e.Type == runtime.APITypeWarning {
			c.list = append(c.list, fmt.Sprintf("%s: %s", e.Type, e.Args[0].Value))
		}
	case *log.EventEntryAdded:
		if e.Entry.Level == log.LevelError || e.Entry.Level == log.LevelWarning {
			c.list = append(c.list, e.Entry.Text+" "+e.Entry.URL)
		}
	}
}

// shots are the looks that the page must have: no wider than the window, and a
// picture of each for whoever wants to see.
var shots = []struct {
	name   string
	width  int64
	height int64
}{{"desktop", 1280, 800}, {"tablet", 820, 900}, {"phone", 360, 740}}

// browser starts Chromium. It crashes now and then while it starts, before it has
// seen the page: that is logged, and it is started again.
func browser(t *testing.T, path string) context.Context {
	t.Helper()
	all, cancel := context.WithTimeout(context.Background(), limit(time.Minute))
	t.Cleanup(cancel)
	for attempt := 1; ; attempt++ {
		opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()),
			chromedp.NoSandbox, // root can't have one, nor may everybody else; it sees nothing but our page
			chromedp.WSURLReadTimeout(limit(30*time.Second)))
		ctx, cancel := chromedp.NewExecAllocator(all, opts...)
		t.Cleanup(cancel)
		// Events that are newer than this client are no errors of the page.
		ctx, cancel = chromedp.NewContext(ctx, chromedp.WithErrorf(func(string, ...any) {}))
		t.Cleanup(cancel)
		err := chromedp.Run(ctx)
		if err == nil {
			return ctx
		}
		require.Less(t, attempt, 3, "%s doesn't start: %v", path, err)
		t.Logf("%s: %v", path, err)
	}
}

// The page shows what happens: numbers move, a click kills a worker, and nothing
// is lost by lblisten. It does so in both colour schemes, on a desktop and on a
// phone, by mouse and by keyboard, without a complaint and without a jump.
func TestPage(t *testing.T) {
	path := chromium(t)
	url := dashboard(t)
	pictures := os.Getenv("LBLISTEN_TEST_PICTURES")
	if pictures == "" {
		pictures = t.TempDir()
	}

	ctx := browser(t, path)
	var bad complaints
	chromedp.ListenTarget(ctx, bad.hear)

	// run does things in the page, in order.
	run := func(actions ...chromedp.Action) {
		t.Helper()
		require.NoError(t, chromedp.Run(ctx, actions...))
	}
	// await waits until a condition of the page holds.
	await := func(js string) chromedp.Action {
		return chromedp.Poll(js, nil, chromedp.WithPollingTimeout(limit(20*time.Second)), chromedp.WithPollingInterval(50*time.Millisecond))
	}
	// What the page is asked: a count of a side, what is in force for a worker, a
	// button by its name, and how much the layout has moved by itself.
	const helpers = `
		count = (side, label) => [...document.querySelectorAll('.side.' + side + ' dl div')]
			.find(d => d.querySelector('dt').textContent === label).querySelector('dd').textContent.replaceAll(',', '');
		info = (worker, label) => [...document.querySelectorAll('[aria-label="Worker ' + worker + '"] .info div')]
			.find(d => d.querySelector('dt').textContent === label).querySelector('dd').textContent;
		logged = text => document.getElementById('log').textContent.includes(text);
		button = name => document.querySelector('button[aria-label="' + name + '"]');
		jumps = 0;
		new PerformanceObserver(l => l.getEntries().forEach(e => { jumps += e.value })).observe({type: 'layout-shift', buffered: false});
	`
	var served, now string
	var jumps float64
	run(
		emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "light"}}),
		chromedp.EmulateViewport(1280, 800),
		chromedp.Navigate(url),
		chromedp.WaitVisible(".side.theirs"),
		chromedp.Evaluate(helpers, nil),
		await(`count('ours', 'served') > 0`),
		chromedp.Evaluate(`count('ours', 'served')`, &served),
	)
	run(await(fmt.Sprintf(`+count('ours', 'served') > %s && +count('theirs', 'served') > %s`, served, served)))

	// A listener stalls, by the keyboard, and its queue grows; a worker is killed
	// when its queues are full.
	run(
		chromedp.Focus(`button[aria-label="Stall listener 1.1 for 5 seconds"]`),
		chromedp.KeyEvent("\r"),
		await(`button('Stall listener 1.1 for 5 seconds').textContent === 'Stalls'`),
		chromedp.Click("#burst"),
		await(`logged('burst of 2000')`),
		await(`info(1, 'if it is killed').includes('handoff')`),                                 // the other process holds its sockets
		await(`button('Kill worker 1 with SIGKILL').getAttribute('aria-disabled') === 'false'`), // the burst is over
		chromedp.Click(`button[aria-label="Kill worker 1 with SIGKILL"]`),
		await(`button('Start worker 1') && logged('SIGKILL to worker 1')`),
		chromedp.Evaluate(`jumps`, &jumps),
	)
	require.Less(t, jumps, 0.001, "the layout moved by itself")
	picture := func(scheme string) {
		for _, s := range shots {
			var png []byte
			var overflow int
			run(
				emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}),
				chromedp.EmulateViewport(s.width, s.height),
				chromedp.Evaluate(`document.documentElement.scrollWidth - document.documentElement.clientWidth`, &overflow),
				chromedp.FullScreenshot(&png, 100),
			)
			require.Zero(t, overflow, "%s, %s: the page is wider than the window", scheme, s.name)
			name := filepath.Join(pictures, s.name+"-"+scheme+".png")
			require.NoError(t, os.WriteFile(name, png, 0o644))
		}
	}
	picture("light")
	run(
		// Everybody who waited has an answer, or none to expect.
		await(`count('ours', 'waiting') < 100 && count('theirs', 'waiting') < 100`),
		chromedp.EmulateViewport(1280, 800),
		await(`button('Start worker 1').getAttribute('aria-disabled') === 'false'`),
		chromedp.Click(`button[aria-label="Start worker 1"]`),
		await(`button('Restart worker 1')`),
	)
	picture("dark")

	// Hidden, it stands still.
	run(
		chromedp.Evaluate(`Object.defineProperty(document, 'hidden', {value: true, configurable: true});
			document.dispatchEvent(new Event('visibilitychange'))`, nil),
		await(`document.getElementById('status').textContent === 'paused'`),
		chromedp.Evaluate(`count('ours', 'served')`, &served),
		chromedp.Sleep(time.Second), // two ticks
		chromedp.Evaluate(`count('ours', 'served')`, &now),
	)
	require.Equal(t, served, now)
	run(
		chromedp.Evaluate(`delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))`, nil),
		await(fmt.Sprintf(`document.getElementById('status').textContent === 'live' && +count('ours', 'served') > %s`, served)),
	)

	var lost, died, theirs string
	run(
		chromedp.Evaluate(`count('ours', 'lost')`, &lost),
		chromedp.Evaluate(`count('ours', 'died with the process')`, &died),
		chromedp.Evaluate(`count('theirs', 'lost')`, &theirs),
	)
	t.Logf("lblisten: %s lost, %s died with the process; go-reuseport: %s lost; %s served", lost, died, theirs, served)
	require.Equal(t, "0", lost)
	require.NotEqual(t, "–", theirs)

	bad.mu.Lock()
	defer bad.mu.Unlock()
	require.Empty(t, bad.list, "the console")
}
