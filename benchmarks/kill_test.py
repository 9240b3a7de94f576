"""Kills a training run at random moments until it has finished, then compares it with another.

    python benchmarks/kill_test.py                 # 20 SIGKILLs, tiny T5 with MoV, some minutes
    python benchmarks/kill_test.py --kills 5 --signal TERM

Every process is started by the same command. Three kills in four come at a random time after the
first new line of metrics.jsonl, so that each life makes some progress; the fourth comes at a random
time while the process is still starting. The other run is left alone. At the end the newest
checkpoint of both runs must hold the same bits (adapters, optimiser state, key), and metrics.jsonl
the same bytes.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from moe_peft import patching
from moe_peft.training import checkpoints, metrics_writer
from moe_peft.weights import saved_run

TRAINER = pathlib.Path(__file__).parent / "kill_test_run.py"


def start(trainer: str, folder: pathlib.Path, num_steps: int) -> subprocess.Popen:
    """Starts, or goes on with, the run in `folder`."""
    log = (folder.parent / f"{folder.name}.log").open("a")
    command = [sys.executable, trainer, str(folder), str(num_steps)]
    # Compile once; twenty times would only prove patience.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def num_lines(folder: pathlib.Path) -> int:
    """Returns the number of lines of the run's metrics."""
    path = folder / metrics_writer.FILE_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_with_kills(
    trainer: str,
    folder: pathlib.Path,
    num_steps: int,
    kills: int,
    number: signal.Signals,
    rng: random.Random,
) -> tuple[int, list[int]]:
    """Returns (kills that hit a living run, newest checkpoint after each of them)."""
    reached = []
    while True:
        process = start(trainer, folder, num_steps)
        if len(reached) == kills:
            break
        before = num_lines(folder)
        if len(reached) % 4 == 3:
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            while process.poll() is None and num_lines(folder) <= before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(number)
        process.wait()
        reached.append((saved_run.steps(folder) or [0])[-1])
        print(f"kill {len(reached)}: newest checkpoint is of step {reached[-1]}", flush=True)
    code = process.wait()
    if code:
        raise SystemExit(f"the last life ended with code {code}; see {folder.name}.log")
    return len(reached), reached


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Returns what differs between the newest checkpoints and metrics of two runs."""
    saved = [checkpoints.load_newest(folder) for folder in (a, b)]
    flat = [
        patching.flatten({"trainable": each.trainable, "position": each.position}) for each in saved
    ]
    found = [] if saved[0].step == saved[1].step else ["step"]
    found += sorted(set(flat[0]) ^ set(flat[1]))
    for name in sorted(set(flat[0]) & set(flat[1])):
        if np.asarray(flat[0][name]).tobytes() != np.asarray(flat[1][name]).tobytes():
            found.append(name)
    name = metrics_writer.FILE_NAME
    if (a / name).read_bytes() != (b / name).read_bytes():
        found.append(name)
    return found


def main():
    """Prints the figures; exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--trainer", default=str(TRAINER), help="script: FOLDER STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None, help="keep the runs there")
    args = parser.parse_args()
    root = pathlib.Path(args.folder or tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    number = getattr(signal, f"SIG{args.signal}")
    rng = random.Random(args.seed)
    hits, reached = run_with_kills(
        args.trainer, root / "killed", args.steps, args.kills, number, rng
    )
    if start(args.trainer, root / "whole", args.steps).wait():
        raise SystemExit("the uninterrupted run failed; see whole.log")
    found = differences(root / "killed", root / "whole")
    damaged = list((root / "killed").glob(f"{checkpoints.DAMAGED_FOLDER}/*"))
    print(
        f"{hits} SIG{args.signal}s in a run of {args.steps} steps, at checkpoints {reached}; "
        f"{len(damaged)} damaged checkpoints; {time.monotonic() - began:.0f} s"
    )
    print(f"DIFFERENT: {', '.join(found)}" if found else "final state and metrics: bit-identical")
    return bool(found) or hits < args.kills


if __name__ == "__main__":
    sys.exit(main())
