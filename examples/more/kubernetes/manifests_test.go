//go:build linux

// Package kubernetes tries the manifests beside it, as far as that goes without a
// cluster.
package kubernetes

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lblisten/lblisten"
	"github.com/lblisten/lblisten/examples/internal/exampletest"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) { exampletest.Main(m, serve) }

// serve stands for a container of the pod. Its arguments are the address and the path.
func serve() {
	ln, err := lblisten.Listen("tcp", os.Args[1], lblisten.WithHandoff(os.Args[2]))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready on", ln.Addr())
	http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, os.Args[3]) }))
}

// pods decodes the manifests of a file with the types of Kubernetes, where no field
// may be unknown or double, and returns the pods' specifications.
func pods(t *testing.T, manifests string) (specs []corev1.PodSpec) {
	for _, doc := range strings.Split(manifests, "\n---\n") {
		var kind metav1.TypeMeta
		require.NoError(t, yaml.Unmarshal([]byte(doc), &kind))
		var into any
		switch kind.APIVersion + " " + kind.Kind {
		case "apps/v1 Deployment":
			into = new(appsv1.Deployment)
		case "apps/v1 DaemonSet":
			into = new(appsv1.DaemonSet)
		case "v1 Service":
			into = new(corev1.Service)
		case "policy/v1 PodDisruptionBudget":
			into = new(policyv1.PodDisruptionBudget)
		default:
			t.Fatalf("%v: no type for it", kind)
		}
		require.NoError(t, yaml.UnmarshalStrict([]byte(doc), into))
		switch m := into.(type) {
		case *appsv1.Deployment:
			require.Equal(t, m.Spec.Selector.MatchLabels, m.Spec.Template.Labels)
			specs = append(specs, m.Spec.Template.Spec)
		case *appsv1.DaemonSet:
			require.Equal(t, m.Spec.Selector.MatchLabels, m.Spec.Template.Labels)
			specs = append(specs, m.Spec.Template.Spec)
		}
	}
	return specs
}

func read(t *testing.T, name string) string {
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(b)
}

func TestManifests(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	require.NoError(t, err)
	require.Len(t, files, 3)
	for _, f := range files {
		t.Run(f, func(t *testing.T) {
			for _, pod := range pods(t, read(t, f)) {
				for _, c := range pod.Containers {
					job := make(map[string]string)
					for _, e := range c.Env {
						job[e.Name] = e.Value
					}
					require.Equal(t, ":8080", job["LBLISTEN_RESTART_ADDR"])
					require.Len(t, c.VolumeMounts, 1)
					require.Equal(t, pod.Volumes[0].Name, c.VolumeMounts[0].Name)
					require.Contains(t, job["LBLISTEN_RESTART_HANDOFF"], c.VolumeMounts[0].MountPath+"/")
					require.Equal(t, pod.Containers[0].Env, c.Env, "one job for all processes")
					require.Equal(t, pod.Containers[0].VolumeMounts, c.VolumeMounts)
					for _, before := range pod.InitContainers {
						require.Equal(t, before.VolumeMounts, c.VolumeMounts)
					}
				}
			}
		})
	}
	require.Len(t, pods(t, read(t, "deployment.yaml"))[0].Containers, 2)
}

// The alternatives that stand in comments are right too.
func TestAlternatives(t *testing.T) {
	text := read(t, "deployment.yaml")
	sysctl := strings.NewReplacer("# sysctls:", "sysctls:", "# - {name: net.", "- {name: net.").Replace(text)
	require.Equal(t, []corev1.Sysctl{{Name: "net.ipv4.tcp_migrate_req", Value: "1"}}, pods(t, sysctl)[0].SecurityContext.Sysctls)

	// It takes the place of the other security context, of both containers.
	h := strings.Index(text, "        securityContext: &restricted\n")
	i := h + strings.Index(text[h:], "        # securityContext: &restricted\n")
	j := i + strings.Index(text[i:], "        volumeMounts:")
	bpf := text[:h] + strings.ReplaceAll(text[i:j], "# ", "") + text[j:]
	for _, c := range pods(t, bpf)[0].Containers {
		require.Equal(t, []corev1.Capability{"BPF"}, c.SecurityContext.Capabilities.Add)
		require.Zero(t, *c.SecurityContext.RunAsUser)
	}
}

// Two containers have two PID namespaces, one network and one directory. One is
// stopped and killed, with connections in its queue; the other answers them.
func TestHandoffBetweenContainers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root makes PID namespaces")
	}
	path, addr := filepath.Join(exampletest.Dir(t), "handoff"), fmt.Sprintf("127.0.0.1:%d", exampletest.Port(t))
	start := func(name string) *exampletest.Process {
		cmd := exampletest.Unprivileged(t, exampletest.Command(t, addr, path, name))
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
		p := exampletest.Run(t, cmd)
		p.Hear("ready on ")
		return p
	}
	one := start("one")
	start("two")
	exampletest.Freeze(t, one.Pid())
	conns := exampletest.Standing(t, addr, 100)
	one.Signal(syscall.SIGKILL)
	require.NotContains(t, exampletest.Answers(t, conns), "one")
	one.Wait()
	start("one") // the kubelet starts it again
}

// An emptyDir itself can't be the handoff's directory, because everybody may write to
// it; one in it is made.
func TestEmptyDirIsRefused(t *testing.T) {
	dir := exampletest.Dir(t)
	require.NoError(t, os.Chmod(dir, 0o777))
	_, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithHandoff(dir))
	require.ErrorContains(t, err, "has mode 0777")
	ln, err := lblisten.Listen("tcp", "127.0.0.1:0", lblisten.WithHandoff(filepath.Join(dir, "handoff")))
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}
