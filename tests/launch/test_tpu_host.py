"""launch/tpu/host.sh: a command on a host outlives its connection, and saves when it is told to."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu" / "host.sh"
TRAIN = (
    'trap "echo saved; exit 5" TERM; echo up; until [ -f "$0/end" ]; do sleep 0.05; done; exit 7'
)


@pytest.fixture
def host(tmp_path):
    """host.sh in a folder of its own; what it leaves running is stopped."""
    folder = tmp_path / "moe_peft_launch"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)

    def call(*arguments):
        command = ["bash", str(folder / SCRIPT.name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    call.folder = folder
    yield call
    assert call("stop").returncode == 0


@contextlib.contextmanager
def follow(host, attempt="1"):
    command = ["bash", str(host.folder / SCRIPT.name), "run", attempt, "bash", "-c", TRAIN]
    with subprocess.Popen(
        [*command, str(host.folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline().endswith("] up\n")
        yield process


def test_a_command_is_followed_to_its_exit_code(host):
    with follow(host) as process:
        (host.folder / "end").touch()
        assert process.wait(timeout=30) == 7


def test_the_environment(host):
    tell = 'echo "$MOE_PEFT_DISTRIBUTED $JAX_PLATFORMS ${PATH%%:*}"'
    told = host("run", "1", "bash", "-c", tell).stdout.split("] ")[1].split()
    assert told[:2] == ["auto", "tpu,cpu"]
    assert told[2].endswith("/moe_peft_launch/venv/bin")


def test_a_lost_connection_is_taken_up_again(host):
    with follow(host) as process:
        os.killpg(process.pid, signal.SIGKILL)
    with follow(host) as process:  # Not started twice.
        (host.folder / "end").touch()
        assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 7
    assert host("run", "1", "false").returncode == 7  # Over, and its code is kept.


def test_stop_lets_the_command_save(host):
    with follow(host) as process:
        assert host("stop").returncode == 0
        assert process.communicate(timeout=30)[0].endswith("] saved\n")
    assert process.returncode == 5


def test_a_new_attempt_starts_anew(host):
    (host.folder / "end").touch()
    for attempt in ("1", "2"):
        with follow(host, attempt) as process:
            assert process.wait(timeout=30) == 7


def test_a_host_that_was_restarted_knows_no_code(host):
    assert host("run", "1", "false").returncode == 1
    with follow(host, "2") as process:
        os.killpg(int((host.folder / "pid").read_text()), signal.SIGKILL)
        assert process.wait(timeout=30) == 143


def test_install(host, stand_ins, monkeypatch):
    for name in ("python3", "sudo", "gcsfuse", "mountpoint"):
        stand_ins.add(name, "exit 1" if name == "mountpoint" else "")
    monkeypatch.setenv("PATH", stand_ins.environ()["PATH"])
    assert host("install", "./source", "gs://b:/mnt/r", "h:/e:/mnt/e").returncode == 0
    calls = stand_ins.calls
    assert (
        "gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 b /mnt/r"
        in calls
    )
    assert "sudo mount -t nfs h:/e /mnt/e" in calls
    assert calls[-1] == (
        "python3 -m uv pip install --quiet --python venv/bin/python "
        "--reinstall-package moe-peft-jax ./source jax[tpu]"
    )
