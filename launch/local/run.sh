#!/usr/bin/env bash
# Starts a command in several processes on this machine that train as one.
#   bash launch/local/run.sh --processes 2 moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov
# --processes N   how many (default 2)
# --port P        of the first one, where the others find it (default: a free one)
# --dry_run       print what would be started, and start nothing
# Lines of process I begin with "[I] ". If one process fails, the others are ended too. Ctrl-C and SIGTERM stop all of them.
set -euo pipefail

usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

processes=2 port="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --processes) processes="${2:-}"; shift 2 || usage ;;
    --port) port="${2:-}"; shift 2 || usage ;;
    --dry_run) dry_run=1; shift ;;
    --help | -h) usage ;;
    --*) echo "launch/local/run.sh: unknown flag $1; expected --processes N, --port P or --dry_run before the command." >&2; exit 2 ;;
    *) break ;;
  esac
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || {
  echo "launch/local/run.sh: --processes is '$processes'; expected a whole number of at least 1." >&2
  exit 2
}
[ $# -gt 0 ] || usage
if [ -z "$port" ]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
fi

pids=()
stop() {
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'stop TERM' TERM
trap 'stop TERM' INT  # Bash has its background processes ignore SIGINT.

for ((i = 0; i < processes; i++)); do
  spec="localhost:$port,$processes,$i"
  if [ -n "$dry_run" ]; then
    printf 'MOE_PEFT_DISTRIBUTED=%q' "$spec"
    printf ' %q' "$@"
    printf '\n'
    continue
  fi
  MOE_PEFT_DISTRIBUTED="$spec" "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=("$!")
done

code=0
left=${#pids[@]}
while [ "$left" -gt 0 ]; do
  status=0
  wait -n || status=$?
  # A signal that this script passed on also wakes it. Go on waiting for the processes themselves.
  running=0
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then running=$((running + 1)); fi
  done
  if [ "$running" -lt "$left" ]; then
    left=$running
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status
      # The others may be saving for the same reason. After that time, those that still run are ended.
      sleep "${MOE_PEFT_GRACE:-10}" && stop TERM &
    fi
  fi
done
exit "$code"
