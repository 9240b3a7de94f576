"""How fast whole models are converted, and how much memory it takes.

    python benchmarks/convert.py --model t5_1_1_xl --folder /tmp/convert

Makes a checkpoint with random weights in Hugging Face's format, converts it to T5X (legacy, scanned
legacy, orbax) and back, each conversion in a process of its own, and prints megabytes per second
and the largest resident memory of that process. What is compared at the end is every byte.
Removes what it wrote.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from moe_peft.weights import (
    formats,
    hugging_face,
    leaves,
    locations,
    t5_sizes,
    t5x_files,
)

CONVERSIONS = {
    "hf to t5x": ("hf", "t5x", "legacy", False),
    "t5x to hf": ("t5x", "hf2", None, False),
    "hf to scanned t5x": ("hf", "scanned", "legacy", True),
    "scanned t5x to hf": ("scanned", "hf3", None, False),
    "hf to orbax": ("hf", "orbax", "orbax", False),
}


def make(folder, name):
    """Writes random bfloat16 weights of the network called `name`."""
    config = t5_sizes.config_named(name)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1_000_003, np.float32).astype(leaves.BFLOAT16)

    def leaf(path, shape):
        values = lambda: np.resize(np.roll(block, rng.integers(block.size)), shape)
        return leaves.Leaf(shape, leaves.BFLOAT16, values, path)

    found = {path: leaf(path, shape) for path, shape in t5_sizes.shapes_of(config).items()}
    hugging_face.write(folder / "hf", config, found)


def convert(folder, source, target, layout, scanned):
    """Converts one checkpoint and prints what it took, as JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    opened = formats.open_backbone(folder / source).scanned(scanned)
    if layout is None:
        hugging_face.write(folder / target, opened.config, opened.leaves)
    else:
        t5x_files.write(folder / target, opened.config, opened.leaves, layout=layout)
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "bytes": sum(leaf.nbytes for leaf in opened.leaves.values()),
        "largest_leaf": max(leaf.nbytes for leaf in opened.leaves.values()),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": before * 1024,
    }
    print(json.dumps(found))


def same(folder, one, other):
    """Whether two folders of Hugging Face hold the same bytes, tensor by tensor."""
    one, other = (
        hugging_face.open_tensors(locations.existing(folder / name)) for name in (one, other)
    )
    return one.keys() == other.keys() and all(
        leaf.read().tobytes() == other[key].read().tobytes() for key, leaf in one.items()
    )


def main():
    """Runs all conversions, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="t5_1_1_small", help="a file of gin/models")
    parser.add_argument("--folder", default="/tmp/moe_peft_convert", type=pathlib.Path)
    parser.add_argument("--only", choices=CONVERSIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        convert(args.folder, *CONVERSIONS[args.only])
        return
    args.folder.mkdir(parents=True)
    try:
        make(args.folder, args.model)
        files = sorted((args.folder / "hf").glob("*.safetensors"))
        largest = max(path.stat().st_size for path in files)
        print(f"{args.model}: {len(files)} files, the largest {largest / 1e9:.2f} GB")
        for name, (source, target, layout, _) in CONVERSIONS.items():
            command = [sys.executable, __file__, "--folder", args.folder, "--only", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            print(
                f"{name:18} {found['bytes'] / 1e9:6.2f} GB {found['seconds']:7.1f} s "
                f"{found['bytes'] / 1e6 / found['seconds']:7.0f} MB/s   "
                f"peak memory {found['peak'] / 1e9:5.2f} GB "
                f"({found['before'] / 1e9:.2f} GB before), largest leaf "
                f"{found['largest_leaf'] / 1e9:.2f} GB",
                flush=True,
            )
            if layout is None:
                print(f"{'':18} every byte the same: {same(args.folder, 'hf', target)}")
            if source != "hf":
                shutil.rmtree(args.folder / source)
                shutil.rmtree(args.folder / target)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
