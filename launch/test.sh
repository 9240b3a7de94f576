#!/usr/bin/env bash
# Makes a virtual environment, installs the project into it, and runs lint and the tests.
#   bash launch/test.sh           lint and the default tests
#   bash launch/test.sh --slow    the slow tests too
# Other arguments go to pytest. MOE_PEFT_VENV chooses the environment's folder (default .venv-test), PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${MOE_PEFT_VENV:-.venv-test}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "launch/test.sh: Python 3.11 or newer is needed, got $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 2
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet --editable ".[test]"

echo "== lint"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/shellcheck" launch/*.sh launch/*/*.sh launch/*/*.sbatch tests/launch/*/*.sh .ci/run

echo "== tests"
exec "$venv/bin/python" -m pytest -n "${MOE_PEFT_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
