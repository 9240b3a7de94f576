#!/usr/bin/env bash
# Submits a training run to Slurm: one process per GPU on several nodes, saved and queued again before the time limit.
#   bash launch/slurm/run.sh --nodes 2 --gpus 8 --time=04:00:00 --partition=gpu \
#     moe-peft train --gin_file experiments/mov/3b/mov_10.gin --gin.MODEL_DIR=/shared/runs/mov
# --nodes N          how many (default 1)
# --gpus G           of a node, one process each (default 8); 0 for one process per node on its CPUs
# --name NAME        of the job (default moe_peft)
# --logs FOLDER      for NAME-JOB.log, appended to by every restart (default .)
# --grace SECONDS    before the time limit training is told to save (default 120)
# --max_restarts N   after which the job is not queued again (default 100)
# --dry_run          print the line and the script that would be submitted, and submit nothing
# Flags of the form --name=value go to sbatch as they are. The environment is passed on: activate the project's first.
set -euo pipefail
script="launch/slurm/run.sh"
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/../common.sh"

nodes=1 gpus=8 name=moe_peft logs=. grace=120 max_restarts=100 dry_run="" more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes) nodes="${2:-}"; shift 2 || usage ;;
    --gpus) gpus="${2:-}"; shift 2 || usage ;;
    --name) name="${2:-}"; shift 2 || usage ;;
    --logs) logs="${2:-}"; shift 2 || usage ;;
    --grace) grace="${2:-}"; shift 2 || usage ;;
    --max_restarts) max_restarts="${2:-}"; shift 2 || usage ;;
    --dry_run) dry_run=1; shift ;;
    --help | -h) usage ;;
    --*=*) more+=("$1"); shift ;;
    --*) fail "unknown flag $1; expected --nodes, --gpus, --name, --logs, --grace, --max_restarts or --dry_run, or sbatch's own as --name=value" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage
for flag in nodes gpus grace max_restarts; do
  is_count "${!flag}" || fail "--$flag is '${!flag}'; expected a whole number"
done
[ "$nodes" -gt 0 ] || fail "--nodes is 0; expected at least 1"
find_model_dir "$@"

submit=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$((gpus > 0 ? gpus : 1))")
# All GPUs of the node are visible to all of its tasks; jax gives each task the one of its local rank.
[ "$gpus" -eq 0 ] || submit+=("--gres=gpu:$gpus")
submit+=("--output=$logs/%x-%j.log" "--signal=B:TERM@$grace" ${more[@]+"${more[@]}"} "$here/train.sbatch" "$max_restarts" "$@")

if [ -n "$dry_run" ]; then
  quoted mkdir -p "$logs"
  quoted "${submit[@]}"
  printf '\n# %s:\n' "$here/train.sbatch"
  cat "$here/train.sbatch"
  exit
fi
command -v sbatch >/dev/null || fail "sbatch was not found; run this where jobs are submitted to Slurm, or look with --dry_run"
command -v "$1" >/dev/null || fail "$1 was not found; activate the environment that the project is installed in, the same on all nodes"
mkdir -p "$logs"
exec "${submit[@]}"
