#!/bin/sh
# Restarts a server by hand: starts the new one, waits until it has the sockets of
# the old one, then stops the old one. If none runs, it just starts one.
#
#   go build -o lblisten-example ./examples/restart
#   examples/restart/restart.sh ./lblisten-example "$HOME/.lblisten-example"
#
# The directory keeps that of the handoff, the pid and the logs. The address is
# that of LBLISTEN_RESTART_ADDR, or 127.0.0.1:8080.
set -eu

if [ $# -ne 2 ]; then
	echo "usage: restart.sh PROGRAM DIRECTORY" >&2
	exit 2
fi
program=$1
dir=$2

# Logs and pid are this user's. The handoff makes a directory of its own in it, whose
# path must be absolute.
mkdir -p "$dir"
chmod 0700 "$dir"
dir=$(cd "$dir" && pwd)

LBLISTEN_RESTART_ADDR=${LBLISTEN_RESTART_ADDR:-127.0.0.1:8080}
LBLISTEN_RESTART_HANDOFF=$dir/handoff
export LBLISTEN_RESTART_ADDR LBLISTEN_RESTART_HANDOFF

# The old one, if it lives. Its number may be another program's by now.
old=
if [ -f "$dir/pid" ]; then
	old=$(cat "$dir/pid")
	case $(ps -o args= -p "$old" 2>/dev/null || true) in
	*"${program##*/}"*) ;;
	*) old= ;;
	esac
fi

# nohup, so that it outlives this shell's terminal.
log=$dir/log.$(date +%Y%m%d-%H%M%S).$$
nohup "$program" >"$log" 2>&1 </dev/null &
new=$!

# The first server is ready when it listens. A later one also says that another
# process would take over from it by handoff: then the two hold each other's sockets.
# Both are said by the line that a program logs by log.Print(g.Info()), too.
want='^ready on |members [1-9]'
[ -z "$old" ] || want='^who takes over if this process dies: .*handoff|on kill .*handoff'
tries=10
until grep -Eq "$want" "$log"; do
	tries=$((tries - 1))
	if [ "$tries" -eq 0 ] || ! kill -0 "$new" 2>/dev/null; then
		echo "restart.sh: the new server is not ready, the old one goes on; see $log" >&2
		kill "$new" 2>/dev/null || true
		exit 1
	fi
	sleep 1
done
echo "$new" >"$dir/pid"
echo "started $new, log in $log"

# It closes its listeners, answers what it has accepted, and ends.
if [ -n "$old" ]; then
	kill -TERM "$old"
	tries=30
	while kill -0 "$old" 2>/dev/null; do
		tries=$((tries - 1))
		if [ "$tries" -eq 0 ]; then
			echo "restart.sh: the old server, $old, does not end" >&2
			exit 1
		fi
		sleep 1
	done
	echo "stopped $old"
fi
