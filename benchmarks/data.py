"""Examples per second from cached token ids into the train step, and memory over many tasks.

A mixture of tasks whose ids lie in caches on disk is read as training reads it: drawn, padded (or
packed), made into arrays, put on the device. Resident memory is measured all along: what the
process owns, and apart from it the pages of mapped files, which the system takes back when it
wants. Exits with 1 if what the process owns grows by more than a tenth once a fifth is over.

    python benchmarks/data.py [--tasks 1000] [--rows 1000] [--batches 4000] [--pack] [--output F]

Ids are random numbers of random lengths, made once and kept with --folder FOLDER.
"""

import argparse
import itertools
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import measure
import numpy as np

from moe_peft.runtime import tensorflow_logs

with tensorflow_logs.silenced():
    from moe_peft.data import encoding, mixing, pipeline, row_store, rows

POINTS = 20  # of the course of memory


def main() -> int:
    """Measures, prints, saves; 1 if memory grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="of each task")
    parser.add_argument("--batches", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=256, help="tokens of a row")
    parser.add_argument("--targets", type=int, default=64, help="likewise")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--folder", help="keep the caches there")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return run(options, pathlib.Path(options.folder or temporary))


def run(options: argparse.Namespace, folder: pathlib.Path) -> int:
    """One measurement with the caches in `folder`."""
    before, start = resident()["anonymous"], time.perf_counter()
    sources = [task(folder, number, options) for number in range(options.tasks)]
    opened = time.perf_counter() - start
    stream = mixing.Stream(sources, [1.0] * len(sources), seed=0)
    make = pipeline.packed if options.pack else pipeline.padded
    batches = make(stream, options.batch_size, (options.inputs, options.targets), 0)
    course, examples, tokens = [], 0, 0
    cpu, wall = time.process_time(), time.perf_counter()
    every = max(options.batches // POINTS, 1)
    for number, batch in enumerate(itertools.islice(batches, options.batches), start=1):
        jax.block_until_ready(jax.device_put(batch))
        examples += num_examples(batch)
        tokens += int((batch["encoder_input_tokens"] > 0).sum())
        if number % every == 0:
            course.append(resident())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    anonymous = [point["anonymous"] for point in course]
    # Every task has been met, and its order drawn, once the first fifth is over.
    settled = anonymous[len(anonymous) // 5 :]
    ratio = max(settled) / settled[0]
    total = options.tasks * options.rows
    print(
        f"{measure.hardware()}\n{options.tasks} tasks of {options.rows} rows, {total:,} in all, "
        f"{size(folder) / 1e9:.2f} GB of caches, opened in {opened:.2f} s\n"
        f"{examples:,} examples ({tokens:,} input tokens) in {cpu:.1f} s of one core: "
        f"{examples / cpu:,.0f} examples/s per core ({examples / wall:,.0f}/s of wall time)\n"
        f"resident memory: {before / 1e6:.0f} MB before the first task is opened, "
        f"{settled[0] / 1e6:.0f} MB after a fifth of the batches, {max(settled) / 1e6:.0f} MB at "
        f"most afterwards: ratio {ratio:.3f}; mapped files {course[-1]['mapped'] / 1e6:.0f} MB"
    )
    measure.save(
        options.output,
        {
            "benchmark": "data",
            "tasks": options.tasks,
            "rows": options.rows,
            "batch_size": options.batch_size,
            "lengths": [options.inputs, options.targets],
            "packed": options.pack,
            "examples": examples,
            "examples_per_core_second": examples / cpu,
            "examples_per_second": examples / wall,
            "input_tokens_per_core_second": tokens / cpu,
            "resident_before": before,
            "resident": course,
            "memory_ratio": ratio,
        },
    )
    return int(ratio > 1.1)


def task(folder: pathlib.Path, number: int, options: argparse.Namespace) -> rows.Rows:
    """The rows of one task, made at the first call as a reader of records would."""

    def lines():
        rng = np.random.default_rng(number)
        lengths = rng.integers(
            (options.inputs // 4, 4), (options.inputs, options.targets), (options.rows, 2)
        )
        for inputs, targets in lengths:
            yield row_store.Line(rng.integers(3, 32_000, inputs), rng.integers(3, 32_000, targets))

    key = (options.rows, options.inputs, options.targets)
    found = row_store.stored(folder, f"task{number}", key, lines)
    scalar = np.broadcast_to(np.int32(number), (len(found),))
    scalars = {"task_ids": scalar, "template_ids": np.broadcast_to(np.int32(0), (len(found),))}
    return rows.Rows(found.inputs, found.targets, scalars)


def num_examples(batch: encoding.Batch) -> int:
    """Examples of a batch: its rows, or its segments."""
    if "encoder_segment_ids" in batch:
        return int(batch["encoder_segment_ids"].max(axis=1).sum())
    return len(batch["encoder_input_tokens"])


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and of files that are mapped."""
    fields = dict(
        line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines()
    )
    kilobytes = lambda name: int(fields[name].split()[0])
    return {"anonymous": 1024 * kilobytes("RssAnon"), "mapped": 1024 * kilobytes("RssFile")}


def size(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
