#!/usr/bin/env bash
# Every host of a slice runs this for launch/tpu/run.sh. It is copied to ~/moe_peft_launch there and works in that folder.
#   bash host.sh stop                          tells a run that is still there to save, and waits for its end
#   bash host.sh install SPEC [SOURCE:FOLDER]...  mounts the folders; installs what pip calls SPEC, and jax for TPUs
#   bash host.sh run ATTEMPT COMMAND...        starts the command, or follows it where that attempt was already started
# The command outlives the connection. `run` prints what it prints, and ends with its exit code.
set -euo pipefail
cd "$(dirname "$0")"

is_running() {
  [ -f pid ] && grep -qs host.sh "/proc/$(cat pid)/cmdline"
}

stop() {
  is_running || return 0
  kill -TERM -- "-$(cat pid)"
  while is_running; do sleep 0.2; done
}

attach() {
  local source="${1%:*}" folder="${1##*:}"
  mountpoint --quiet "$folder" && return
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  case "$source" in
    gs://*)
      command -v gcsfuse >/dev/null || install_gcsfuse
      # Checkpoints are renamed folders. The other hosts have to see at once what one host writes.
      gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "${source#gs://}" "$folder"
      ;;
    *)
      command -v mount.nfs >/dev/null || sudo apt-get install --quiet --yes nfs-common
      sudo mount -t nfs "$source" "$folder"
      ;;
  esac
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl --silent --show-error --fail "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet
  sudo apt-get install --quiet --yes gcsfuse
}

install() {
  local spec="$1" folder
  shift
  for folder in "$@"; do attach "$folder"; done
  if [ -f source.tar.gz ]; then
    rm -rf source
    tar --extract --gzip --file source.tar.gz
  fi
  # The hosts' own Python may be older than what the project needs; uv brings one.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
  [ -x venv/bin/python ] || python3 -m uv venv --quiet --python ">=3.11,<3.14" venv
  python3 -m uv pip install --quiet --python venv/bin/python --reinstall-package moe-peft-jax "$spec" "jax[tpu]"
}

started() {
  local code=0 folder="$PWD"
  trap : TERM # The command handles it. This shell stays to record how it ended.
  [ ! -d source ] || cd source
  "$@" || code=$?
  echo "$code" >"$folder/code.partial"
  mv "$folder/code.partial" "$folder/code"
}

run() {
  local attempt="$1"
  shift
  if [ "$(cat attempt 2>/dev/null)" != "$attempt" ]; then
    rm -f code
    : >log # Followed at once, perhaps before the command has opened it.
    MOE_PEFT_DISTRIBUTED=auto JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1 PATH="$PWD/venv/bin:$PATH" \
      setsid bash host.sh started "$@" </dev/null >>log 2>&1 &
    echo "$!" >pid
    echo "$attempt" >attempt
  fi
  tail --lines=+1 --follow --sleep-interval=0.2 --pid="$(cat pid)" log | sed -u "s/^/[${HOSTNAME##*-}] /"
  # Without a code the host itself was restarted.
  exit "$(cat code 2>/dev/null || echo 143)"
}

verb="${1:-}"
[ $# -eq 0 ] || shift
case "$verb" in
  stop) stop ;;
  install) install "$@" ;;
  run) run "$@" ;;
  started) started "$@" ;;
  *) sed -n '3,5s/^# \{0,1\}//p' host.sh >&2 && exit 2 ;;
esac; exit # Read as one line: this file may be replaced while it runs.
