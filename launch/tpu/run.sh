#!/usr/bin/env bash
# Trains on a TPU slice: creates or reuses it, installs the project on all of its hosts, runs the command there and follows
# it. After a preemption it creates the slice again and goes on.
#   bash launch/tpu/run.sh --name mov --zone us-west4-a --type v5litepod-16 --version v2-alpha-tpuv5-lite --spot \
#     --mount gs://my-bucket:/mnt/runs \
#     moe-peft train --gin_file experiments/mov/3b/mov_10.gin --gin.MODEL_DIR=/mnt/runs/mov
# --name NAME            of the slice, and of the queued resource
# --zone ZONE            and --project PROJECT (default: gcloud's own)
# --type TYPE            as gcloud calls it: v5litepod-16, v4-32, ...
# --version VERSION      of the hosts' software: v2-alpha-tpuv5-lite, tpu-ubuntu2204-base, ...
# --spot                 cheaper, but may be preempted
# --queued               ask for a queued resource, and wait until it is granted
# --mount SOURCE:FOLDER  on all hosts: gs://BUCKET (gcsfuse) or HOST:/EXPORT (NFS); MODEL_DIR has to be below FOLDER
# --package SPEC         what pip installs: a wheel on this machine, or a requirement (default: the checkout's last commit)
# --max_restarts N       after which the run is given up (default 20); a preempted slice is deleted to make room for the next
# --delete_after         delete the slice once the command has ended, however it ended
# --delete               only delete the slice
# --dry_run              print every command, run none
# Ctrl-C and SIGTERM save the run and end it. A lost connection does not: give the same line to follow the run again.
set -euo pipefail
script="launch/tpu/run.sh"
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/../common.sh"

name="" zone="" project="" type="" version="" spot="" queued="" mounts=() package="" max_restarts=20
delete="" delete_after="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name) name="${2:-}"; shift 2 || usage ;;
    --zone) zone="${2:-}"; shift 2 || usage ;;
    --project) project="${2:-}"; shift 2 || usage ;;
    --type) type="${2:-}"; shift 2 || usage ;;
    --version) version="${2:-}"; shift 2 || usage ;;
    --mount) mounts+=("${2:-}"); shift 2 || usage ;;
    --package) package="${2:-}"; shift 2 || usage ;;
    --max_restarts) max_restarts="${2:-}"; shift 2 || usage ;;
    --spot) spot=1; shift ;;
    --queued) queued=1; shift ;;
    --delete_after) delete_after=1; shift ;;
    --delete) delete=1; shift ;;
    --dry_run) dry_run=1; shift ;;
    --help | -h) usage ;;
    --*) fail "unknown flag $1; --help lists them, and the command comes after all of them" ;;
    *) break ;;
  esac
done

at=("--zone=$zone" --quiet)
[ -z "$project" ] || at+=("--project=$project")
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
poll="${MOE_PEFT_POLL:-30}" # seconds between two looks at a slice
child="" running="" asked="" signaled=""

say() {
  echo "== $*" >&2
}

# Runs or, with --dry_run, prints a command; a signal reaches this script at once and not the command.
await() {
  local code
  if [ -n "$dry_run" ]; then
    quoted "$@"
    return
  fi
  [ -z "$asked" ] || return "$asked"
  "$@" &
  child=$!
  while wait "$child"; code=$?; [ -n "$signaled" ]; do
    signaled="" # It ended `wait`, not the command.
  done
  return "$code"
}

# Sets `line` to the command that has all hosts call host.sh so.
to_hosts() {
  line=("${vm[@]}" ssh "$name" "${at[@]}" --worker=all "--command=bash moe_peft_launch/host.sh $(quoted "$@")")
}

on_hosts() {
  to_hosts "$@"
  await "${line[@]}"
}

on_signal() {
  signaled=1
  if [ -n "$running" ] && [ -z "$asked" ]; then
    say "stopping; the run saves first (after a second signal this script does not wait)"
    to_hosts stop
    "${line[@]}" &
  elif [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
  asked="$1"
}
trap 'on_signal 130' INT
trap 'on_signal 143' TERM

remove() {
  if [ -n "$queued" ]; then
    await "${queue[@]}" delete "$name" "${at[@]}" --force
  else
    await "${vm[@]}" delete "$name" "${at[@]}"
  fi
}

create() {
  if [ -n "$queued" ]; then
    await "${queue[@]}" create "$name" "${at[@]}" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
  else
    await "${vm[@]}" create "$name" "${at[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
  fi
}

# Sets `state` to what `describe` says in the field $1, or MISSING. The network may be away for a while.
look() {
  local field="$1" tries
  shift
  for tries in 1 2 3 4 5; do
    if state="$("$@" describe "$name" "${at[@]}" "--format=value($field)" 2>"$work/stderr")"; then return; fi
    state=MISSING
    if grep -qi "not_found\|not found" "$work/stderr"; then return; fi
    [ "$tries" -eq 5 ] || await sleep "$poll" || return
  done
  say "gcloud cannot describe $name: $(head -n 1 "$work/stderr")"
  return 1
}

# Returns once the slice can be used.
make_ready() {
  local last="" created=""
  if [ -n "$dry_run" ]; then
    quoted "${vm[@]}" describe "$name" "${at[@]}" "--format=value(state)"
    echo "# unless it is READY:"
    create
    return
  fi
  while :; do
    look state "${vm[@]}" || return
    if [ "$state" = MISSING ] && [ -n "$queued" ]; then
      look state.state "${queue[@]}" || return
      [ "$state" != ACTIVE ] || state=CREATING # The queue has granted what is not listed yet.
    fi
    [ "$state" = "$last" ] || say "$name is $state"
    last="$state"
    case "$state" in
      READY) return ;;
      MISSING)
        [ -z "$created" ] || return 143 # Gone already.
        create || return
        created=1 ;;
      PREEMPTED | TERMINATED | SUSPENDED) remove || return ;;
      FAILED | STOPPED | HIDDEN | UNKNOWN) say "a slice that is $state has to be repaired by hand, or deleted with --delete" && return 2 ;;
      *) await sleep "$poll" || return ;;
    esac
  done
}

# The project and `host.sh`, on all hosts.
prepare() {
  await "${vm[@]}" scp "$bundle" "$name:" "${at[@]}" --worker=all --recurse &&
    on_hosts stop &&
    on_hosts install "$spec" ${mounts[@]+"${mounts[@]}"}
}

finish() {
  if [ -n "$delete_after" ]; then
    asked=""
    say "deleting $name"
    remove || say "$name was not deleted; try: bash $script --delete --name $name --zone $zone"
  elif [ -z "$dry_run" ]; then
    say "$name stays and costs; to delete it: bash $script --delete --name $name --zone $zone${project:+ --project $project}${queued:+ --queued}"
  fi
  exit "$1"
}

for flag in name zone; do
  [ -n "${!flag}" ] || fail "--$flag is missing; expected the slice's, as in --name mov --zone us-west4-a"
done
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud was not found; install the Google Cloud CLI, or look with --dry_run"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [ -n "$delete" ]; then
  remove
  exit
fi

[ $# -gt 0 ] || usage
for flag in type version; do
  [ -n "${!flag}" ] || fail "--$flag is missing; expected gcloud's, as in --type v5litepod-16 --version v2-alpha-tpuv5-lite"
done
is_count "$max_restarts" || fail "--max_restarts is '$max_restarts'; expected a whole number"
find_model_dir "$@"
kept=""
for mount in ${mounts[@]+"${mounts[@]}"}; do
  [[ "$mount" =~ ^(gs://[^/:]+|[^/:]+:/[^:]*):(/[^:]+)$ ]] ||
    fail "--mount is '$mount'; expected gs://BUCKET:/FOLDER or HOST:/EXPORT:/FOLDER"
  [[ "$model_dir" != "${BASH_REMATCH[2]}"/* ]] || kept=1
done
[ -n "$kept" ] || fail "MODEL_DIR is $model_dir, which each host has for itself and loses with the slice; expected a folder below a --mount"

bundle="$work/moe_peft_launch"
await mkdir "$bundle"
await cp "$here/host.sh" "$bundle"
if [ -z "$package" ]; then
  spec=./source
  root="$(cd "$here/../.." && pwd)"
  [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] || say "changes that are not committed are left out"
  await git -C "$root" archive --prefix=source/ "--output=$bundle/source.tar.gz" HEAD
elif [ -f "$package" ]; then
  spec="./$(basename "$package")"
  await cp "$package" "$bundle"
elif [[ "$package" == *.whl ]]; then
  fail "--package is $package, which does not exist"
else
  spec="$package"
fi

restarts=0 was_ready="" attempt=""
while :; do
  code=0
  make_ready || code=$?
  if [ "$code" -eq 0 ] && [ -z "$attempt" ]; then
    was_ready=1
    if prepare; then attempt="$(date +%s)-$$"; else code=$?; fi
  fi
  if [ "$code" -eq 0 ]; then
    running=1
    on_hosts run "$attempt" "$@" || code=$?
    running=""
  fi
  if [ "$code" -eq 0 ] || [ -n "$asked" ]; then finish "${asked:-$code}"; fi
  [ -n "$was_ready" ] || finish "$code"

  look state "${vm[@]}" || finish "$code"
  # 255: the connection was lost; 143: SIGTERM, as hosts get it before they are taken away.
  if [ "$state" = READY ] && [ "$code" -ne 143 ] && [ "$code" -ne 255 ]; then finish "$code"; fi
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "ended with code $code; no restarts are left of $max_restarts"
    finish "$code"
  fi
  restarts=$((restarts + 1))
  say "ended with code $code, and $name is $state: restart $restarts of at most $max_restarts"
  if [ "$state" != READY ] || [ "$code" -ne 255 ]; then attempt=""; fi
  await sleep "$poll" || finish "${asked:-$code}"
done
