"""How fast a file of torch is read beside safetensors, and how much memory it takes.

    python benchmarks/torch_files.py --gigabytes 3 --folder /tmp/torch_files

Writes the same random float32 tensors as pytorch_model.bin, in torch's zip and in its serial format
(by hand: torch is not needed), and as safetensors. Reads each in a process of its own, tensor by
tensor, and prints megabytes per second and the largest resident memory of that process. Files may
be in the system's cache, all alike. Removes what it wrote.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import zipfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from moe_peft.weights import hugging_face, leaves, locations, safetensors_files

ROWS, WIDTH = 32128, 2048  # the embedding of T5 1.1 XL
KINDS = ("safetensors", "zip", "serial")
TESTS = pathlib.Path(__file__).parents[1] / "tests" / "weights"


def write(folder, kind, gigabytes):
    """Writes one tensor of 263 MB and then smaller ones, up to so many gigabytes."""
    shapes = {"shared.weight": (ROWS, WIDTH)}
    while sum(map(np.prod, shapes.values())) * 4 < gigabytes * 1e9:
        shapes[f"layer.{len(shapes)}.weight"] = (5120, WIDTH)
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)
    array = lambda shape: values[: shape[0]]
    folder.mkdir(parents=True)
    if kind == "safetensors":
        leaf = lambda shape: leaves.Leaf(shape, values.dtype, lambda: array(shape), "")
        found = {key: leaf(shape) for key, shape in shapes.items()}
        safetensors_files.write_file(folder / safetensors_files.SINGLE, found, {"format": "pt"})
        return
    spec = importlib.util.spec_from_file_location("writing", TESTS / "torch_writing.py")
    by_hand = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_hand)
    last = b"" if kind == "zip" else b"N"
    made = {}
    for n, (key, shape) in enumerate(shapes.items()):
        stored = by_hand.storage(str(n), int(np.prod(shape)), last=last)
        made[key] = by_hand.tensor(stored, 0, shape, (shape[1], 1))
    pickled, path = by_hand.state_dict(**made), folder / "pytorch_model.bin"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            for n, shape in enumerate(shapes.values()):
                archive.writestr(f"archive/data/{n}", memoryview(array(shape)).cast("B"))
        return
    keys = [str(n) for n in range(len(shapes))]
    with path.open("wb") as file:
        file.write(by_hand.serial(pickled, keys=keys, storages=b""))
        for shape in shapes.values():
            file.write(struct.pack("<Q", int(np.prod(shape))))
            file.write(memoryview(array(shape)).cast("B"))


def peak():
    """Returns the largest resident memory so far, in bytes; getrusage counts the parent's too."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def read(folder):
    """Reads every tensor, one after the other, and prints what it took, as JSON."""
    before = peak()
    start = time.perf_counter()
    found = hugging_face.open_tensors(locations.existing(folder))
    opened = time.perf_counter() - start
    total = sum(float(leaf.read()[0, 0]) for leaf in found.values())
    print(
        json.dumps(
            {
                "opened": opened,
                "seconds": time.perf_counter() - start,
                "bytes": sum(leaf.nbytes for leaf in found.values()),
                "largest": max(leaf.nbytes for leaf in found.values()),
                "peak": peak(),
                "before": before,
                "sum": total,
            }
        )
    )


def main():
    """Writes and reads each kind of file, one at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", default="/tmp/moe_peft_torch_files", type=pathlib.Path)
    parser.add_argument("--times", type=int, default=3, help="reads of each file; the best counts")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        read(args.folder / args.only)
        return
    args.folder.mkdir(parents=True)
    try:
        for kind in KINDS:
            write(args.folder / kind, kind, args.gigabytes)
            command = [sys.executable, __file__, "--folder", args.folder, "--only", kind]
            outputs = [subprocess.check_output(command, text=True) for _ in range(args.times)]
            found = min(map(json.loads, outputs), key=lambda one: one["seconds"])
            limit = 1.3 * found["largest"] + 1e9
            print(
                f"{kind:12} {found['bytes'] / 1e9:5.2f} GB  opened in {found['opened']:.3f} s, "
                f"read in {found['seconds']:.2f} s, {found['bytes'] / 1e6 / found['seconds']:.0f} "
                f"MB/s; peak memory {found['peak'] / 1e9:.2f} GB ({found['before'] / 1e9:.2f} "
                f"before), largest tensor {found['largest'] / 1e9:.2f} GB, limit {limit / 1e9:.2f}",
                flush=True,
            )
            shutil.rmtree(args.folder / kind)
            if found["peak"] > limit:
                sys.exit(f"{kind}: more memory than 1.3 times the largest tensor and 1 GB.")
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
