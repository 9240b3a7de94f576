#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, without any system service, as whoever calls it.
#   bash tests/launch/slurm/cluster.sh start FOLDER   FOLDER is made; its name has to be short (sockets live in it)
#   export SLURM_CONF=FOLDER/slurm.conf               then sbatch, squeue, scancel work as anywhere
#   bash tests/launch/slurm/cluster.sh stop FOLDER
# Needs root: Debian's slurmd takes its node's name from the machine, so the second one gets namespaces in which the
# machine has another name. Debian: apt-get install slurmctld slurmd slurm-client munge.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[ $# -eq 2 ] || usage
folder="$2"

free_ports() {
  python3 -c '
import socket
sockets = [socket.socket() for _ in range(3)]
for s in sockets: s.bind(("localhost", 0))
print(*(s.getsockname()[1] for s in sockets))'
}

start() {
  mkdir -p "$folder/state"
  folder="$(cd "$folder" && pwd)"
  chmod 755 "$folder"
  read -r controller first second < <(free_ports)
  # Jax looks the first node of a job up by its name.
  one="$(hostname -s)" two="$(hostname -s)-two"
  mkdir -p "$folder/spool-$one" "$folder/spool-$two"
  user="$(id -un)"

  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" --force

  cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$one(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=10
OverTimeLimit=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$one NodeAddr=127.0.0.1 Port=$first CPUs=4 RealMemory=4000
NodeName=$two NodeAddr=127.0.0.1 Port=$second CPUs=4 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10
CONF
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld
  slurmd
  { cat /etc/hosts && echo "127.0.0.1 $two"; } >"$folder/hosts"
  # shellcheck disable=SC2016  # $1 and $2 are the inner shell's.
  unshare --uts --mount bash -c 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd' -- "$two" "$folder/hosts"
  for _ in $(seq 60); do
    if [ "$(sinfo -h -p low -t idle -o %D 2>/dev/null)" = 2 ]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.5
  done
  echo "cluster.sh: the two nodes did not become idle in 30 s; see $folder/*.log" >&2
  exit 1
}

stop() {
  export SLURM_CONF="$folder/slurm.conf"
  scancel --user="$(id -un)" || true
  for _ in $(seq 60); do
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 0.5
  done
  local file pid
  for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
    [ -f "$file" ] || continue
    pid="$(cat "$file")"
    while kill "$pid" 2>/dev/null; do sleep 0.2; done
  done
}

case "$1" in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
