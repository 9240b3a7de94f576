"""launch/slurm: what is submitted, when a job queues itself again; slow: a cluster of two nodes."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "run.sh"
JOB = ROOT / "launch" / "slurm" / "train.sbatch"
CLUSTER = ROOT / "tests" / "launch" / "slurm" / "cluster.sh"
TRAIN = ["moe-peft", "train", "--gin_file", "experiments/cldr/mov.gin", "--gin.MODEL_DIR=/s/a b"]


def submit(*arguments, **kwargs):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_dry_run_prints_the_line_and_the_script():
    done = submit("--dry_run", "--nodes", "2", "--gpus", "4", "--grace", "300", "--time=1", *TRAIN)
    assert done.returncode == 0, done.stderr
    folder, line, _, _, *job = done.stdout.splitlines()
    assert folder == "mkdir -p ."
    assert shlex.split(line) == [
        *("sbatch", "--job-name=moe_peft", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4"),
        *("--output=./%x-%j.log", "--signal=B:TERM@300", "--time=1", str(JOB), "100", *TRAIN),
    ]
    assert job == JOB.read_text().splitlines()


def test_submits(stand_ins, tmp_path):
    stand_ins.add("sbatch")
    stand_ins.add("moe-peft")
    logs = tmp_path / "logs"
    done = submit("--gpus", "0", "--logs", str(logs), *TRAIN, env=stand_ins.environ())
    assert done.returncode == 0, done.stderr
    (call,) = stand_ins.calls
    assert "--nodes=1 --ntasks-per-node=1 --output" in call  # No GPUs are asked for.
    assert logs.is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0", *TRAIN], "--nodes is 0"),
        (["--gpus", "all", *TRAIN], "--gpus is 'all'; expected a whole number"),
        (["--prozesses", "2", *TRAIN], "unknown flag --prozesses"),
        (["python", "train.py"], "the command begins with 'python'; expected moe-peft"),
        (["moe-peft", "train"], "the command names no MODEL_DIR"),
        (["moe-peft", "train", "--gin.MODEL_DIR='gs://b/x'"], "MODEL_DIR is gs://b/x, but runs"),
        ([], "Submits a training run to Slurm"),
        (TRAIN, "sbatch was not found"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    for name in ("bash", "sed", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = submit(*arguments, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert message in done.stderr


def start_job(programs, srun, state="RUNNING", restarts="1"):
    programs.add("srun", srun)
    programs.add("squeue", f"echo {state}")
    # As Slurm does: a job that is queued again is ended; a signal goes to the tasks.
    programs.add("scontrol", "kill -TERM $PPID")
    programs.add("scancel", 'kill -TERM "$(cat "$here/task")"')
    variables = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n", "SLURM_RESTART_COUNT": restarts}
    job = subprocess.Popen(
        ["bash", str(JOB), "2", "moe-peft", "train"],
        env=programs.environ(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    return job


def names(programs):
    return [call.split()[0] for call in programs.calls]


@pytest.mark.parametrize(
    ("code", "state", "restarts", "calls"),
    [
        (0, "RUNNING", "1", ["srun"]),
        (7, "RUNNING", "1", ["srun"]),
        (143, "RUNNING", "1", ["srun", "squeue", "scontrol"]),
        (143, "COMPLETING", "1", ["srun", "squeue"]),  # It was cancelled.
        (143, "RUNNING", "2", ["srun", "squeue"]),  # No restarts are left.
    ],
)
def test_how_a_job_ends(code, state, restarts, calls, stand_ins):
    job = start_job(stand_ins, f"exit {code}", state, restarts)
    output, _ = job.communicate(timeout=30)
    assert names(stand_ins) == calls
    assert stand_ins.calls[0] == "srun --label --kill-on-bad-exit=0 --wait=120 moe-peft train"
    if "scontrol" in calls:
        assert stand_ins.calls[-1] == "scontrol requeue 5"
        assert "ended with code 143; queued again" in output
    else:
        assert job.returncode == code


def test_the_time_limit_reaches_the_tasks_and_the_job_is_queued_again(stand_ins):
    save = "sleep 0.2; echo saved >>$here/calls; exit 143"
    train = f'trap "{save}" TERM; echo $$ >"$here/task"; echo up; while sleep 0.2; do :; done'
    job = start_job(stand_ins, train)
    assert "moe-peft train on n" in job.stdout.readline()
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert names(stand_ins) == ["srun", "scancel", "saved", "squeue", "scontrol"]
    assert stand_ins.calls[1] == "scancel --signal=TERM 5"


def steps(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(1)


@pytest.mark.slow
def test_a_real_cluster(tmp_path_factory):
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for program in ("slurmctld", "slurmd", "munged", "sbatch", "unshare"):
        if not shutil.which(program, path=search):
            pytest.skip(f"{program} is not installed (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("the second node needs root for its namespaces")

    folder = tmp_path_factory.mktemp("s")
    run = folder / "mov"
    environ = {
        **os.environ,
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
    }
    environ.pop("XLA_FLAGS")  # One device a process.
    subprocess.run(["bash", str(CLUSTER), "start", str(folder)], check=True, timeout=60)
    try:
        done = submit(
            *("--nodes", "2", "--gpus", "0", "--logs", str(folder), "--time=00:20:00"),
            *("moe-peft", "train", "--gin_file", "experiments/cldr/mov.gin"),
            *(f"--gin.MODEL_DIR={run}", "--gin.train.evaluator=None", "--gin.train.log_period=1"),
            *("--gin.TRAIN_STEPS=120", "--gin.BATCH_SIZE=4"),
            env=environ,
            cwd=folder,
        )
        assert done.stdout == "Submitted batch job 1\n", done.stderr
        log = folder / "moe_peft-1.log"
        text = lambda: log.read_text() if log.exists() else "no log"
        wait_until(lambda: steps(run), 600, text)
        # What --signal=B:TERM@120 does before the time limit.
        subprocess.run(["scancel", "--batch", "--signal=TERM", "1"], env=environ, check=True)
        wait_until(lambda: "queued again" in text(), 300, text)
        saved = steps(run)[-1]
        assert f"SIGTERM: saved step {saved};" in text()
        assert saved < 120
        wait_until(lambda: "restart 1 of at most 100: ended with code 0" in text(), 600, text)
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], check=True, timeout=60)
    assert steps(run) == list(range(1, 121))
