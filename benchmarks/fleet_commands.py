"""`moe-peft adapt` for 35 few-shot runs in one command against a command for each run.

What a user does with and without mapped runs, start, compilation and evaluation included: one
command for the 35 tasks of `cldr_new` with one seed, and commands for single tasks of it (some of
them, drawn by a fixed seed; their median stands for all). Results of both ways are compared.

    python benchmarks/fleet_commands.py [--variant lora] [--source RUN] [--commands 3]
        [--output fleet_commands.json]
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import measure


def adapt(folder: pathlib.Path, options: argparse.Namespace, *more: str) -> tuple[float, dict]:
    """Seconds and results.json of one command."""
    source = [f"--gin.SOURCE={options.source}"] if options.source else []
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "moe_peft", "adapt"),
            *("--gin_file", f"experiments/cldr/fewshot/{options.variant}.gin"),
            *(f"--gin.MODEL_DIR={folder}", "--gin.SEEDS=(0,)", *source, *more),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    return time.perf_counter() - started, json.loads((folder / "results.json").read_text())


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="lora", help="of experiments/cldr/fewshot")
    parser.add_argument("--source", help="folder of its multi-task run; default: fresh adapters")
    parser.add_argument("--commands", type=int, default=3, help="single runs to time")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        together, results = adapt(pathlib.Path(root) / "together", options)
        runs = {run["task"]: run for run in results["runs"]}
        seconds, differences = [], []
        for task in random.Random(0).sample(sorted(runs), options.commands):
            took, alone = adapt(pathlib.Path(root) / task, options, f"--gin.MIXTURE={task}")
            seconds.append(took)
            curves = zip(alone["runs"][0]["curve"], runs[task]["curve"], strict=True)
            differences += [abs(a["loss"] - b["loss"]) for a, b in curves]
    alone = statistics.median(seconds)
    ratio = len(runs) * alone / together
    measure.show(
        f"{options.variant}: {len(runs)} few-shot runs as commands ({measure.hardware()})",
        ["", "seconds"],
        [
            ["all runs in one command", f"{together:.1f}"],
            ["one run in a command, median", f"{alone:.1f}"],
            [f"{len(runs)} such commands over the one", f"{ratio:.1f}"],
            ["largest difference of a validation loss", f"{max(differences):.1e}"],
        ],
    )
    figures = {"together": together, "alone": seconds, "ratio": ratio}
    measure.save(options.output, {"benchmark": "fleet_commands", **figures})


if __name__ == "__main__":
    main()
