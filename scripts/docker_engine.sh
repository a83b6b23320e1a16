#!/bin/sh
# A private Docker engine for the container tests: its own data, socket and network namespace, so that nothing of the host changes.
# usage: docker_engine.sh start|stop|kill|status DIR [bridge]     (start prints the DOCKER_HOST to use; kill is for tests of a crash;
# with bridge, containers have the engine's usual network, whose published ports are on the loopback interface of its namespace)
set -eu

action=${1:-}
home=${2:-}
network=${3:-none}
usage() {
	echo "usage: $0 start|stop|kill|status DIR [bridge]" >&2
	exit 2
}
[ -n "$home" ] || usage
pidfile=$home/docker.pid
socket=$home/docker.sock

running() {
	# the pid in the file may have become somebody else's: its command line must be of this very engine
	[ -f "$pidfile" ] && tr '\0' ' ' <"/proc/$(cat "$pidfile")/cmdline" 2>/dev/null | grep -q -- "--pidfile=$pidfile "
}

ready() {
	curl -fsS --max-time 2 --unix-socket "$socket" http://docker/_ping >/dev/null 2>&1
}

install() {
	command -v dockerd >/dev/null 2>&1 && return
	echo "installing docker.io by apt" >&2
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io bubblewrap; } >&2
}

start() {
	if ! running; then
		install
		mkdir -p "$home"
		rm -f "$pidfile"
		files=$(ulimit -Hn)
		alone="--iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none"
		[ "$network" = bridge ] && alone=
		# shellcheck disable=SC2086  # its words are options
		setsid unshare -n -- sh -c 'ip link set lo up; exec dockerd "$@"' dockerd \
			--host="unix://$socket" --data-root="$home/data" --exec-root="$home/run" --pidfile="$pidfile" \
			--storage-driver=overlay2 $alone --exec-opt native.cgroupdriver=cgroupfs \
			--default-ulimit "nofile=$files:$files" >>"$home/log" 2>&1 </dev/null &
	fi
	for _ in $(seq 150); do
		if ready; then
			echo "unix://$socket"
			return
		fi
		sleep 0.2
	done
	echo "the engine in $home did not answer within 30 s; its log ends with:" >&2
	tail -n 20 "$home/log" >&2
	exit 1
}

end() {
	running || return 0
	pid=$(cat "$pidfile")
	kill "-$1" "$pid"
	for _ in $(seq 150); do
		if ! [ -d "/proc/$pid" ]; then
			# an engine mounts its data over itself, and leaves that when it was killed once
			while umount "$home/data" 2>/dev/null; do :; done
			return 0
		fi
		sleep 0.2
	done
	echo "the engine of $home (pid $pid) is still there after 30 s" >&2
	exit 1
}

case $action in
start) start ;;
stop) end TERM ;;
kill) end KILL ;;
status) if ready; then echo running; else echo down; fi ;;
*) usage ;;
esac
