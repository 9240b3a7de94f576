"""launch/local/run.sh: what each process is told, and how a failure ends all of them."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local" / "run.sh"
TELL = "import os; print(os.environ['MOE_PEFT_DISTRIBUTED'])"
FIRST_FAILS = (
    "import os, sys, time\n"
    "if os.environ['MOE_PEFT_DISTRIBUTED'].endswith(',0'): sys.exit(7)\n"
    "time.sleep(60)"
)


def run(*arguments, **kwargs):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_dry_run_starts_nothing():
    done = run("--dry_run", "--processes", "2", "--port", "5", "touch", "a b")
    assert done.stdout.splitlines() == [
        rf"MOE_PEFT_DISTRIBUTED=localhost:5\,2\,{index} touch a\ b" for index in range(2)
    ]


def test_every_process_is_told_its_place():
    done = run("--processes", "3", "--port", "5", sys.executable, "-c", TELL)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{i}] localhost:5,3,{i}" for i in range(3)]


def test_a_failure_ends_the_others_and_is_the_exit_code(monkeypatch):
    monkeypatch.setenv("MOE_PEFT_GRACE", "0")
    started = time.monotonic()
    done = run("--processes", "2", sys.executable, "-c", FIRST_FAILS)
    assert done.returncode == 7
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all(number):
    wait = "import time; print('here', flush=True); time.sleep(60)"
    command = ["bash", str(SCRIPT), "--processes", "2", sys.executable, "-c", wait]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"[0] here\n", "[1] here\n"}
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=50) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "true"], "--processes is '0'; expected a whole number"),
        (["--prozesses", "2", "true"], "unknown flag --prozesses"),
        ([], "Starts a command in several processes"),
    ],
)
def test_mistakes(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
