"""launch/tpu: which calls of gcloud follow which state of the slice, and what its hosts do."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "tpu"
SLICE = ["--name", "t", "--zone", "z", "--type", "v5litepod-16", "--version", "w"]
WHERE = [*SLICE, "--package", "moe-peft-jax", "--mount", "gs://b:/mnt/r"]
MOUNT = ["--mount", "gs://b:/mnt/r"]
TRAIN = ["moe-peft", "train", "--gin.MODEL_DIR=/mnt/r/a b"]

# `tpu-vm` and `queued-resources` hold what `describe` answers next, one a line, the last one for
# ever; `runs` what happens next when the hosts run the command.
GCLOUD = r"""
next() {
  head -n 1 "$here/$1"
  [ "$(wc -l <"$here/$1")" -lt 2 ] || sed -i 1d "$here/$1"
}
fail() { echo "ERROR: $*" >&2; exit 1; }
become() { printf '%s\n' "$@" >"$here/tpu-vm"; }
queue() { printf '%s\n' "$@" >"$here/queued-resources"; }
case "$3 $4" in
  *\ describe)
    state="$(next "$3")"
    [ "$state" != MISSING ] || fail "NOT_FOUND: Resource 't' was not found"
    echo "$state" ;;
  *\ create)
    [ ! -f "$here/refuse" ] || fail "no capacity"
    become CREATING READY
    [ ! -f "$here/gone" ] || become MISSING
    [ "$3" = tpu-vm ] || { become MISSING MISSING READY; queue WAITING_FOR_RESOURCES ACTIVE; } ;;
  *\ delete) become MISSING; queue MISSING ;;
  *\ scp) cp -r "$5" "$here/copied" ;;
  *\ ssh)
    case "$*" in
      *"host.sh run"*) eval "$(next runs)" ;;
      *"host.sh install"*) [ ! -f "$here/slow" ] || { echo up; exec sleep 60; } ;;
    esac ;;
esac
"""


@pytest.fixture
def gcloud(stand_ins):
    stand_ins.add("gcloud", GCLOUD)
    (stand_ins.folder / "tpu-vm").write_text("MISSING\n")
    (stand_ins.folder / "queued-resources").write_text("MISSING\n")
    (stand_ins.folder / "runs").write_text("exit 0\n")
    return stand_ins


@contextlib.contextmanager
def start(gcloud, *arguments):
    with subprocess.Popen(
        ["bash", str(FOLDER / "run.sh"), *arguments],
        env=gcloud.environ(MOE_PEFT_POLL="0.01"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # It would be waited for.


def run(gcloud, *arguments):
    with start(gcloud, *arguments) as process:
        process.out, process.err = process.communicate(timeout=60)
    return process


def verbs(gcloud):
    """What was done, without the looking: `create`, `scp`, `ssh stop`, ..."""
    found = []
    for call in gcloud.calls:
        words = call.split()
        if words[4] == "ssh":
            found.append(f"ssh {call.split('host.sh ')[1].split()[0]}")
        elif words[4] != "describe":
            found.append(words[4])
    return found


READY = ["scp", "ssh stop", "ssh install", "ssh run"]


def test_creates_installs_and_runs(gcloud):
    done = run(gcloud, *SLICE, "--spot", *MOUNT, *TRAIN)
    assert done.returncode == 0, done.err
    assert verbs(gcloud) == ["create", *READY]
    assert gcloud.calls[:5] == [
        "gcloud compute tpus tpu-vm describe t --zone=z --quiet --format=value(state)",
        "gcloud compute tpus tpu-vm create t --zone=z --quiet --accelerator-type=v5litepod-16 "
        "--version=w --spot",
        *["gcloud compute tpus tpu-vm describe t --zone=z --quiet --format=value(state)"] * 2,
        gcloud.calls[4],
    ]
    assert gcloud.calls[4].endswith("/moe_peft_launch t: --zone=z --quiet --worker=all --recurse")
    copied = gcloud.folder / "copied"
    assert (copied / "host.sh").read_text() == (FOLDER / "host.sh").read_text()
    with tarfile.open(copied / "source.tar.gz") as archive:
        assert "source/setup.py" in archive.getnames()
    assert gcloud.calls[-2].endswith("host.sh install ./source gs://b:/mnt/r")
    assert gcloud.calls[-1].endswith(r" moe-peft train --gin.MODEL_DIR=/mnt/r/a\ b")
    assert "t stays and costs" in done.err


def test_reuses_a_slice_and_a_wheel_and_deletes_when_asked(gcloud, tmp_path):
    (gcloud.folder / "tpu-vm").write_text("READY\n")
    wheel = tmp_path / "moe_peft_jax-1-py3-none-any.whl"
    wheel.write_bytes(b"x")
    done = run(gcloud, *SLICE, "--package", str(wheel), "--delete_after", *MOUNT, *TRAIN)
    assert done.returncode == 0, done.err
    assert verbs(gcloud) == [*READY, "delete"]
    assert any(f"install ./{wheel.name} gs://" in call for call in gcloud.calls)


def test_a_preempted_run_goes_on_with_the_same_command(gcloud):
    (gcloud.folder / "runs").write_text("become PREEMPTED; exit 255\nexit 0\n")
    done = run(gcloud, *WHERE, *TRAIN)
    assert done.returncode == 0, done.err
    assert verbs(gcloud) == ["create", *READY, "delete", "create", *READY]
    first, second = (call.split("host.sh run ")[1] for call in gcloud.calls if "sh run" in call)
    assert first.split(maxsplit=1)[1] == second.split(maxsplit=1)[1]
    assert "ended with code 255, and t is PREEMPTED: restart 1 of at most 20" in done.err


def test_a_queued_resource_is_waited_for_and_asked_for_again(gcloud):
    (gcloud.folder / "runs").write_text("become MISSING; queue SUSPENDED; exit 1\nexit 0\n")
    done = run(gcloud, *WHERE, "--queued", *TRAIN)
    assert done.returncode == 0, done.err
    assert verbs(gcloud) == ["create", *READY, "delete", "create", *READY]
    (create, *_) = (call for call in gcloud.calls if " create " in call)
    assert create == (
        "gcloud compute tpus queued-resources create t --zone=z --quiet --node-id=t "
        "--accelerator-type=v5litepod-16 --runtime-version=w"
    )
    assert "gcloud compute tpus queued-resources delete t --zone=z --quiet --force" in gcloud.calls


def test_a_lost_connection_is_taken_up_again(gcloud):
    (gcloud.folder / "runs").write_text("exit 255\nexit 0\n")
    done = run(gcloud, *WHERE, *TRAIN)
    assert done.returncode == 0, done.err
    assert verbs(gcloud) == ["create", *READY, "ssh run"]
    assert gcloud.calls[-1] == [call for call in gcloud.calls if "sh run" in call][0]


def test_a_failing_command_is_not_repeated(gcloud):
    (gcloud.folder / "runs").write_text("exit 7\n")
    done = run(gcloud, *WHERE, *TRAIN)
    assert done.returncode == 7
    assert verbs(gcloud) == ["create", *READY]


def test_restarts_are_limited(gcloud):
    (gcloud.folder / "runs").write_text("become TERMINATED; exit 143\n")
    done = run(gcloud, *WHERE, "--max_restarts", "1", *TRAIN)
    assert done.returncode == 143
    assert verbs(gcloud) == ["create", *READY, "delete", "create", *READY]
    assert "no restarts are left of 1" in done.err


def test_what_cannot_be_created_is_not_tried_again(gcloud):
    (gcloud.folder / "refuse").touch()
    done = run(gcloud, *WHERE, *TRAIN)
    assert done.returncode == 1
    assert verbs(gcloud) == ["create"]
    assert "no capacity" in done.err


def test_a_slice_that_is_gone_at_once_is_not_created_for_ever(gcloud):
    (gcloud.folder / "gone").touch()
    (gcloud.folder / "runs").write_text("become PREEMPTED; touch $here/gone; exit 255\n")
    done = run(gcloud, *WHERE, "--max_restarts", "2", *TRAIN)
    assert done.returncode == 143
    assert verbs(gcloud) == ["create"]
    (gcloud.folder / "gone").unlink()
    done = run(gcloud, *WHERE, "--max_restarts", "2", *TRAIN)
    assert done.returncode == 143
    assert verbs(gcloud)[1:] == ["create", *READY, "delete", "create", "create"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_has_the_hosts_save(number, code, gcloud):
    told = """tail -n 1 "$here/calls" | grep -q 'sh stop'"""
    (gcloud.folder / "runs").write_text(f"echo up; until {told}; do sleep 0.05; done; exit 143\n")
    with start(gcloud, *WHERE, *TRAIN) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert verbs(gcloud) == ["create", *READY, "ssh stop"]
    assert "the run saves first" in err


def test_a_signal_ends_the_installation(gcloud):
    (gcloud.folder / "slow").touch()
    with start(gcloud, *WHERE, "--delete_after", *TRAIN) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert verbs(gcloud) == ["create", *READY[:-1], "delete"]


def test_delete_only_deletes(gcloud):
    done = run(gcloud, "--name", "t", "--zone", "z", "--project", "p", "--delete")
    assert done.returncode == 0
    assert gcloud.calls == ["gcloud compute tpus tpu-vm delete t --zone=z --quiet --project=p"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SLICE, *TRAIN], "MODEL_DIR is /mnt/r/a b, which each host has for itself"),
        ([*SLICE, "--mount", "gs://b:/mnt/q", *TRAIN], "expected a folder below a --mount"),
        ([*SLICE, "--mount", "b:c", *TRAIN], "--mount is 'b:c'; expected gs://BUCKET:/FOLDER"),
        ([*SLICE, "moe-peft", "train", "--gin.MODEL_DIR=gs://b/r"], "MODEL_DIR is gs://b/r, but"),
        ([*SLICE[2:], *MOUNT, *TRAIN], "--name is missing"),
        ([*SLICE[:4], *MOUNT, *TRAIN], "--type is missing"),
        (
            [*SLICE, "--package", "a.whl", *MOUNT, *TRAIN],
            "--package is a.whl, which does not exist",
        ),
        ([*SLICE, "--max_restarts", "x", *MOUNT, *TRAIN], "--max_restarts is 'x'; expected"),
        ([*SLICE, "--spott", *MOUNT, *TRAIN], "unknown flag --spott"),
        (SLICE, "Trains on a TPU slice"),
    ],
)
def test_mistakes(arguments, message, gcloud):
    done = run(gcloud, *arguments)
    assert done.returncode == 2
    assert message in done.err
    assert not gcloud.calls


def printed(*arguments):
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "--dry_run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("gcloud")]


DRY_RUNS = [
    [*SLICE, "--spot", "--delete_after", *MOUNT, *TRAIN],
    [*SLICE, "--queued", "--project", "p", "--delete_after", *MOUNT, *TRAIN],
]


def test_dry_run_calls_nothing(gcloud, monkeypatch):
    monkeypatch.setenv("PATH", gcloud.environ()["PATH"])
    words = [shlex.split(line)[3:5] for arguments in DRY_RUNS for line in printed(*arguments)]
    for kind, calls in zip(("tpu-vm", "queued-resources"), (words[:7], words[7:])):
        verbs = ["describe", "create", "scp", "ssh", "ssh", "ssh", "delete"]
        assert [verb for _, verb in calls] == verbs
        assert calls[1][0] == calls[6][0] == kind
    assert not gcloud.calls


@pytest.mark.slow
def test_gcloud_knows_every_flag(tmp_path):
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    environ = {
        **os.environ,
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
    }
    lines = [line for arguments in DRY_RUNS for line in printed(*arguments)]
    assert len(lines) == 14
    for line in [*lines, "gcloud compute tpus tpu-vm create t --zone=z --bogus"]:
        # gcloud's own parser; nothing is sent.
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
        done = subprocess.run(lint, capture_output=True, text=True, timeout=60, env=environ)
        (found,) = json.loads(done.stdout)
        assert found["success"] == ("--bogus" not in line), found["error_message"]


# Two folders are the hosts; what they are told to do they do, but for the installation.
HOSTS = r"""
case "$3 $4" in
  *\ describe) cat "$here/state" ;;
  *\ create) mkdir "$here/w0" "$here/w1"; echo READY >"$here/state" ;;
  *\ delete) rm -r "$here/w0" "$here/w1"; echo MISSING >"$here/state" ;;
  *\ scp)
    for i in 0 1; do
      cp -r "$5" "$here/w$i"
      on_cpu="s/=auto JAX_PLATFORMS=tpu,cpu/=localhost:$PORT,2,$i JAX_PLATFORMS=cpu/"
      sed -i "$on_cpu" "$here/w$i/moe_peft_launch/host.sh"
    done ;;
  *\ ssh)
    for word in "$@"; do case "$word" in --command=*) command="${word#*=}" ;; esac; done
    case "$command" in *" install "*) exit ;; esac
    for i in 0 1; do (cd "$here/w$i" && eval "$command") & done
    code=0
    for job in $(jobs -p); do wait "$job" || code=$?; done
    exit "$code" ;;
esac
"""


@pytest.mark.slow
def test_a_preempted_run_goes_on_to_the_end(stand_ins, tmp_path):
    stand_ins.add("gcloud", HOSTS)
    (stand_ins.folder / "state").write_text("MISSING\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    beside = pathlib.Path(sys.executable).parent
    environ = stand_ins.environ(PORT=str(port), MOE_PEFT_POLL="0.1", XLA_FLAGS="")
    environ["PATH"] = f"{environ['PATH']}{os.pathsep}{beside}"
    metrics = tmp_path / "mov" / "metrics.jsonl"
    steps = lambda: [json.loads(line)["step"] for line in metrics.read_text().splitlines()]

    arguments = [*SLICE, "--package", "x", "--mount", f"h:/e:{tmp_path}", "moe-peft", "train"]
    arguments += ["--gin_file", "experiments/cldr/mov.gin", f"--gin.MODEL_DIR={tmp_path}/mov"]
    arguments += ["--gin.train.evaluator=None", "--gin.train.log_period=1", "--gin.BATCH_SIZE=4"]
    arguments += ["--gin.TRAIN_STEPS=40", "--gin.train.checkpoint_period=5"]
    command = ["bash", str(FOLDER / "run.sh"), *arguments]
    with (tmp_path / "log").open("w") as log:
        with subprocess.Popen(command, env=environ, stdout=log, stderr=log) as process:
            end = time.monotonic() + 600
            while not (metrics.exists() and steps() and steps()[-1] > 6):
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.2)
            (stand_ins.folder / "state").write_text("PREEMPTED\n")
            for path in stand_ins.folder.glob("w?/moe_peft_launch/pid"):
                os.killpg(int(path.read_text()), signal.SIGKILL)
            assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert verbs(stand_ins) == ["create", *READY, "delete", "create", *READY]
    assert "and t is PREEMPTED: restart 1 of at most 20" in (tmp_path / "log").read_text()
    assert steps() == list(range(1, 41))
