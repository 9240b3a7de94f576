"""From the command to the saved adapter on one's own rows, against transformers and PEFT.

Both sides start from the same folder (T5-small with random weights, as transformers saves it) and
the same 2,000 rows of JSONL, make 200 steps of 16 rows with LoRA of rank 8 on the same matrices and
save the adapter. Processes of their own, in turn: start, compilation, data and saving included,
nothing cached from an earlier run. The other side pads each batch to its longest row.

    python benchmarks/own_data.py [--pairs 3] [--steps 200] [--output own_data.json]
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import own_data_peft

BATCH_SIZE, RANK, ROWS = 16, 8, 2000
_MOODS = {
    "positive": ["good", "great", "fine", "best", "love", "happy", "bright", "strong", "kind"],
    "negative": ["bad", "poor", "worst", "hate", "sad", "dark", "weak", "cold", "dull", "wrong"],
}
_WORDS = (
    *("the", "film", "was", "and", "its", "story", "of", "a", "man", "who", "went", "to", "see"),
    *("people", "in", "time", "with", "some", "their", "own", "work", "at", "home", "but", "we"),
)


def write_rows(path: pathlib.Path) -> None:
    """Short tasks: the mood of a text, or its last words."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(ROWS):
            mood = draw.choice(("positive", "negative"))
            words = draw.choices(_WORDS, k=draw.randint(26, 54))
            for place in draw.sample(range(len(words)), 4):
                words[place] = draw.choice(_MOODS[mood])
            task, answer = ("mood:", mood) if number % 2 else ("end:", " ".join(words[-4:]))
            file.write(json.dumps({"inputs": " ".join([task, *words]), "targets": answer}) + "\n")


def timed(commands: list[list[str]], root: pathlib.Path, log: pathlib.Path) -> dict[str, float]:
    """Seconds, processor seconds and largest resident memory (GB) of commands one by one."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"XDG_CACHE_HOME": str(root / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    total = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_gb": 0.0}
    for command in commands:
        started = time.perf_counter()
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{log.read_text()}")
        total["seconds"] += time.perf_counter() - started
        total["cpu_seconds"] += used.ru_utime + used.ru_stime
        total["peak_gb"] = max(total["peak_gb"], used.ru_maxrss * 1024 / 1e9)
    return total


def sides(
    root: pathlib.Path, folder: pathlib.Path, data: pathlib.Path, steps: int
) -> dict[str, list]:
    """The commands of both, each of which writes into `root`."""
    run, adapter = str(root / "run"), str(root / "adapter")
    moe_peft = [sys.executable, "-m", "moe_peft"]
    train = [*moe_peft, "train", "--method", "lora", f"--gin.lora.rank={RANK}"]
    train += ["--backbone", f"hf:{folder}", "--data", str(data), "--eval_fraction", "0"]
    train += ["--out", run, "--steps", str(steps), "--batch_size", str(BATCH_SIZE)]
    numbers = [str(steps), str(BATCH_SIZE), str(RANK)]
    other = [sys.executable, own_data_peft.__file__, str(folder), str(data), adapter, *numbers]
    return {
        "moe_peft": [train, [*moe_peft, "export", run, "--to", adapter]],
        "transformers and PEFT": [other],
    }


def num_trained(adapter: pathlib.Path) -> int:
    """Numbers in the adapter that a side saved."""
    import safetensors

    with safetensors.safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        return sum(file.get_tensor(name).size for name in list(file.keys()))


def median_and_range(values: list[float]) -> str:
    """For a table."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        folder, data = place / "t5_small", place / "train.jsonl"
        write_rows(data)
        subprocess.run([sys.executable, own_data_peft.__file__, "--make", folder, data], check=True)
        for number in range(options.pairs):
            root = place / str(number)
            for side, commands in sides(root, folder, data, options.steps).items():
                root.mkdir()
                figures = timed(commands, root, root / "log.txt")
                figures["trained"] = num_trained(root / "adapter")
                found.setdefault(side, []).append(figures)
                print(side, json.dumps(figures), flush=True)
                shutil.rmtree(root)
    conclude(found, options.steps, options.output)


def conclude(found: dict[str, list], steps: int, output: str | None) -> None:
    """Prints and saves the figures of both sides."""
    import measure

    ours, theirs = found.values()
    ratio = {
        key: [b[key] / a[key] for a, b in zip(ours, theirs, strict=True)]
        for key in ("seconds", "cpu_seconds", "peak_gb")
    }
    rows = [
        [title, *(median_and_range([run[key] for run in runs]) for runs in found.values())]
        + [median_and_range(ratio[key])]
        for title, key in (
            ("seconds", "seconds"),
            ("processor seconds", "cpu_seconds"),
            ("peak memory, GB", "peak_gb"),
        )
    ]
    rows.append(["trained numbers", *(f"{runs[0]['trained']:,}" for runs in found.values()), ""])
    title = f"LoRA of T5-small, {steps} steps of {BATCH_SIZE} ({measure.hardware()})"
    measure.show(title, ["", *found, "theirs / ours"], rows)
    measure.save(
        output, {"benchmark": "own_data", "steps": steps, "runs": found, "theirs_over_ours": ratio}
    )


if __name__ == "__main__":
    main()
