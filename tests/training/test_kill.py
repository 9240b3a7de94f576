"""Real processes, really killed."""

import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parents[1]
KILL_TEST = HERE.parent / "benchmarks" / "kill_test.py"


def _kill_test(tmp_path, *args):
    command = [sys.executable, str(KILL_TEST), "--folder", str(tmp_path), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "final state and metrics: bit-identical" in done.stdout


# Each life is a process that starts anew: a second kill finds what the first one does, and SIGTERM
# is tested in the process of test_loop.py too.
@pytest.mark.parametrize(
    ("signal", "kills"),
    [
        ("KILL", 1),
        pytest.param("KILL", 2, marks=pytest.mark.slow),
        pytest.param("TERM", 2, marks=pytest.mark.slow),
    ],
)
def test_kills_leave_no_trace(tmp_path, signal, kills):
    trainer = ["--trainer", str(HERE / "training_toy.py"), "--steps", "300"]
    _kill_test(tmp_path, "--kills", str(kills), "--signal", signal, *trainer)


@pytest.mark.slow
def test_twenty_kills_of_a_t5_leave_no_trace(tmp_path):
    _kill_test(tmp_path)
