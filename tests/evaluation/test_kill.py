"""Real evaluations, really killed."""

import json
import signal
import subprocess
import sys
import time

import pytest

EVAL = [
    *(
        sys.executable,
        "-m",
        "moe_peft.cli.main",
        "eval",
        "--gin_file",
        "experiments/cldr/frozen.gin",
    ),
    "--gin.Evaluator.decoding=@decoding.Greedy()",
    "--gin.Evaluator.max_examples_per_task=16",
    "--gin.EVAL_BATCH_SIZE=8",  # one a device: four parts
]


def start(folder):
    return subprocess.Popen(
        [*EVAL, f"--gin.MODEL_DIR={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    mixture = "eval/cldr_heldout"
    names = sorted(path.name for path in (whole / mixture / "predictions").iterdir())
    assert len(names) == 63
    num_kills = 0
    for share in (0.2, 0.5, 0.8):
        process = start(killed)
        while process.poll() is None:
            if len(list((killed / mixture).glob("predictions/*.jsonl"))) > share * len(names):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        num_kills += process.returncode == -signal.SIGKILL
    assert num_kills > 0
    assert start(killed).wait() == 0
    for name in names:
        path = f"{mixture}/predictions/{name}"
        assert (whole / path).read_bytes() == (killed / path).read_bytes()
    results = [json.loads((f / mixture / "results.json").read_text()) for f in (whole, killed)]
    assert results[0]["results"] == results[1]["results"]
