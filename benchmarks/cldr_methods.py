"""Every method of the CLDR experiments over several seeds: exact match, spread, parameters, time.

Runs `moe-peft train` and `moe-peft eval` per method and seed, at the settings of the committed
experiment files, and aggregates what they write. Finished runs are not run again, so it can be
stopped and started.

    python benchmarks/cldr_methods.py --folder results/cldr [--methods ia3 mov] [--seeds 0 1 2]
        [--set TRAIN_STEPS=500] [--output docs/results/cldr.json]
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import measure

METHODS = ("frozen", "ia3", "mov", "lora", "molora", "full")
MIXTURES = ("cldr_train", "cldr_heldout")


def command(verb: str, method: str, seed: int, folder: pathlib.Path, extra: list[str]) -> list[str]:
    """The command line of one run."""
    return [
        *(sys.executable, "-m", "moe_peft", verb),
        *("--gin_file", f"experiments/cldr/{method}.gin"),
        f"--gin.MODEL_DIR={folder}",
        f"--gin.SEED={seed}",
        f"--gin.EVAL_MIXTURES={MIXTURES}",
        *(f"--gin.{setting}" for setting in extra),
    ]


def run(method: str, seed: int, root: pathlib.Path, extra: list[str]) -> dict[str, object]:
    """Trains and evaluates unless that is done; returns scores in per cent and seconds."""
    folder = root / f"{method}-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(folder / "log.txt", "a") as log:
            for verb in ("eval",) if method == "frozen" else ("train", "eval"):
                print(f"{method}, seed {seed}: {verb}", flush=True)
                arguments = command(verb, method, seed, folder, extra)
                subprocess.run(arguments, stdout=log, stderr=log, check=True, env=os.environ)
                if verb == "train":
                    trained = time.monotonic() - started
        found = {"train_seconds": 0.0 if method == "frozen" else trained}
        for mixture in MIXTURES:
            result = json.loads((folder / "eval" / mixture / "results.json").read_text())
            found[mixture] = {
                "mean": 100 * result["results"]["overall"]["mean"],
                "median": 100 * result["results"]["overall"]["median"],
                "groups": {
                    name: 100 * group["mean"] for name, group in result["results"]["groups"].items()
                },
            }
            found["trainable"] = result["run"]["trainable_parameters"]
        summary.write_text(json.dumps(found, indent=1))
    return json.loads(summary.read_text())


def spread(values: list[float]) -> str:
    """Mean over seeds and, of several, their standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Runs what is missing, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="gin macros, NAME=VALUE")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    record, rows = {}, []
    for method in options.methods:
        seeds = options.seeds[:1] if method == "frozen" else options.seeds
        runs = [run(method, seed, options.folder.absolute(), options.set) for seed in seeds]
        record[method] = dict(zip(map(str, seeds), runs))
        column = lambda mixture, what, runs=runs: spread([found[mixture][what] for found in runs])
        rows.append(
            [
                method,
                f"{runs[0]['trainable']:,}",
                column("cldr_train", "mean"),
                column("cldr_heldout", "mean"),
                column("cldr_heldout", "median"),
                f"{statistics.median(found['train_seconds'] for found in runs):.0f}",
            ]
        )
    measure.show(
        f"CLDR, exact match in %, mean ± standard deviation over seeds ({measure.hardware()})",
        ["method", "trainable", "training tasks", "held-out, mean", "held-out, median", "train, s"],
        rows,
    )
    settings = {"seeds": options.seeds, "set": options.set}
    measure.save(options.output, {"benchmark": "cldr_methods", **settings, "methods": record})


if __name__ == "__main__":
    main()
