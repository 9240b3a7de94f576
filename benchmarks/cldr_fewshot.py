"""Every variant of "Multi-Head Adapter Routing" on CLDR, both phases, over several seeds.

For each seed: `moe-peft train` of every multi-task method with that seed, then `moe-peft adapt` of
every variant from there, shots and order with the same seed, at the settings of the committed
experiment files. Writes a table (score over seeds, trainable parameters, seconds) and a picture of
parameters against score. What is finished is not run again, so it can be stopped and started.

    python benchmarks/cldr_fewshot.py --folder results/cldr_fewshot [--variants lora mhr mhr_mu]
        [--seeds 0 1 2] [--processes 2] [--output docs/results/cldr_fewshot.json]
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import measure

from moe_peft.reports import compare_adapted, pareto

# Variant to the multi-task run it starts from; both name experiment files.
VARIANTS = {
    "ia3": "ia3",
    "lora": "lora",
    "lora_big": "lora_big",
    "poly": "poly",
    "poly_z": "poly",
    "poly_mu": "poly",
    "mhr": "mhr",
    "mhr_z": "mhr",
    "mhr_mu": "mhr",
    "random_mu_per_task": "random_per_task",
    "random_mu_per_example": "random_per_example",
    "private_mu": "private",
    "soup": "private",
    "full": "full",
}
# Gradient alignment is watched in runs of their own, halved in length: later all losses are near
# zero, and so are the gradients. The papers compare these.
ALIGNED = ("lora", "lora_big", "poly", "mhr")
ALIGNED_STEPS = 100
ALIGNED_PERIOD = 10


def call(verb: str, folder: pathlib.Path, *arguments: str) -> float:
    """Runs one command, its output in `folder`/log.txt; returns its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(folder / "log.txt", "a") as log:
        subprocess.run(
            [*(sys.executable, "-m", "moe_peft", verb), *arguments],
            stdout=log,
            stderr=log,
            check=True,
            env=os.environ,
        )
    return time.monotonic() - started


def train(name: str, seed: int, root: pathlib.Path) -> pathlib.Path:
    """Trains and evaluates one multi-task method, unless that is done; returns its folder."""
    folder = root / f"seed{seed}" / "multitask" / name
    if (folder / "eval" / "cldr_train" / "results.json").exists():
        return folder
    print(f"seed {seed}: train {name}", flush=True)
    files = ["--gin_file", f"experiments/cldr/multitask/{name}.gin"]
    at = f"--gin.MODEL_DIR={folder}"
    monitor = ["--gin_file", "monitors/routing.gin"] if name in ("poly", "mhr") else []
    seconds = call("train", folder, *files, *monitor, at, f"--gin.SEED={seed}")
    (folder / "train_seconds").write_text(f"{seconds:.0f}\n")
    call("eval", folder, *files, at)
    return folder


def adapt(variant: str, seed: int, root: pathlib.Path) -> None:
    """Adapts one variant to every new task, unless that is done."""
    folder = root / f"seed{seed}" / "fewshot" / variant
    if (folder / "results.json").exists():
        return
    source = train(VARIANTS[variant], seed, root)
    print(f"seed {seed}: adapt {variant}", flush=True)
    call(
        "adapt",
        folder,
        *("--gin_file", f"experiments/cldr/fewshot/{variant}.gin"),
        f"--gin.SOURCE={source}",
        f"--gin.MODEL_DIR={folder}",
        f"--gin.SEEDS=({seed},)",
    )


def align(name: str, seed: int, root: pathlib.Path) -> None:
    """Trains a multi-task method with an eye on its tasks' gradients, unless that is done."""
    folder = root / f"seed{seed}" / "alignment" / name
    if (folder / "done").exists():
        return
    print(f"seed {seed}: alignment of {name}", flush=True)
    call(
        "train",
        folder,
        *("--gin_file", f"experiments/cldr/multitask/{name}.gin"),
        *("--gin_file", "monitors/alignment.gin"),
        f"--gin.MODEL_DIR={folder}",
        f"--gin.SEED={seed}",
        f"--gin.TRAIN_STEPS={ALIGNED_STEPS}",
        f"--gin.GradientAlignment.period={ALIGNED_PERIOD}",
    )
    (folder / "done").touch()


def mean_alignment(folder: pathlib.Path) -> dict[str, float]:
    """Mean cosine between tasks' gradients by step, as the monitor wrote it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    key = "alignment/mean_cosine"
    return {str(line["step"]): line[key] for line in lines if key in line}


def collect(variant: str, seeds: list[int], root: pathlib.Path) -> dict[str, object]:
    """What the runs of a variant wrote."""
    found = {"scores": [], "seconds": [], "multitask": [], "train_seconds": []}
    for seed in seeds:
        results = json.loads((root / f"seed{seed}/fewshot/{variant}/results.json").read_text())
        source = root / f"seed{seed}" / "multitask" / VARIANTS[variant]
        evaluated = json.loads((source / "eval" / "cldr_train" / "results.json").read_text())
        found["trainable"] = results["trainable_parameters"]
        found["scores"].append(results["overall"]["over_seeds"]["mean"])
        found["seconds"].append(results["seconds"])
        found["multitask"].append(evaluated["results"]["overall"]["mean"])
        found["train_seconds"].append(float((source / "train_seconds").read_text()))
        found.setdefault("groups", []).append(
            {name: group["over_seeds"]["mean"] for name, group in results["groups"].items()}
        )
    return found


def main() -> None:
    """Runs what is missing, prints, draws, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--aligned", nargs="*", default=list(ALIGNED), choices=ALIGNED)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    root = options.folder.absolute()
    sources = dict.fromkeys(VARIANTS[variant] for variant in options.variants)
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        for seed in options.seeds:
            list(pool.map(lambda name, seed=seed: train(name, seed, root), sources))
            list(pool.map(lambda name, seed=seed: adapt(name, seed, root), options.variants))
            list(pool.map(lambda name, seed=seed: align(name, seed, root), options.aligned))

    record = {v: collect(v, options.seeds, root) for v in options.variants}
    title = f"cldr_new: exact match after adaptation, {len(options.seeds)} seeds of both phases"
    rows = [
        pareto.Row(
            variant, found["trainable"], tuple(found["scores"]), statistics.fmean(found["seconds"])
        )
        for variant, found in record.items()
    ]
    compare_adapted.show(rows, title)
    for path in compare_adapted.write(rows, title, root / "cldr_fewshot"):
        print(f"wrote {path}")
    alignment = {
        name: [mean_alignment(root / f"seed{seed}" / "alignment" / name) for seed in options.seeds]
        for name in options.aligned
    }
    for name, courses in alignment.items():
        means = [statistics.fmean(course.values()) for course in courses]
        values = ", ".join(f"{mean:.4f}" for mean in means)
        print(f"gradient alignment of {name}, mean over {ALIGNED_STEPS} steps, by seed: {values}")
    settings = {"benchmark": "cldr_fewshot", "seeds": options.seeds, "processes": options.processes}
    measure.save(options.output, {**settings, "variants": record, "alignment": alignment})


if __name__ == "__main__":
    main()
