#!/usr/bin/env bash
# Adapts the backbone that comes with the project, on this machine, and shows what that gains.
#   bash launch/quickstart.sh [RESULTS]     results go to the folder RESULTS (default results/quickstart)
# MOE_PEFT_VENV chooses the environment's folder (default .venv-quickstart), PYTHON the interpreter, STEPS the length of
# each training run (default 300). Under four minutes on two cores once the packages are installed.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
results="${1:-$PWD/results/quickstart}"
case "$results" in /*) ;; *) results="$here/$results" ;; esac

venv="${MOE_PEFT_VENV:-.venv-quickstart}"
steps="${STEPS:-300}"
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python="${PYTHON:-}"
if [ -z "$python" ]; then
  for python in python3 python3.13 python3.12 python3.11; do
    is_new_enough "$python" && break
  done
fi
is_new_enough "$python" || {
  echo "launch/quickstart.sh: no Python 3.11 or newer was found; set PYTHON=/path/to/python3.11" >&2
  exit 2
}

echo "== installing into $venv (once; a few minutes)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet .

SECONDS=0
mkdir -p "$results"
echo "== what MoV would train"
echo "\$ moe-peft plan --gin_file experiments/cldr/mov.gin"
# In a process of its own: a plan keeps to the CPU, training does not.
"$venv/bin/moe-peft" plan --gin_file experiments/cldr/mov.gin
"$venv/bin/python" launch/quickstart.py "$results" "$steps"

cat <<END

That took $((SECONDS / 60)) min $((SECONDS % 60)) s. In $results:
  cldr_heldout.md, cldr_heldout.json, cldr_heldout.png   the table above, and a picture of it
  mov/config.gin                                         every setting of that run; it runs again as it is
  mov/eval/cldr_heldout/predictions/*.jsonl              every question, and whether it was answered

Try next ($venv/bin holds moe-peft):
  moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov       the full run
  moe-peft train --gin_file experiments/cldr/molora.gin --gin.MODEL_DIR=results/molora another method
  moe-peft plan --gin_file models/t5_1_1_xl.gin --gin_file methods/mov.gin             a 3B model, without weights
  moe-peft train --help                                                                every flag
END
