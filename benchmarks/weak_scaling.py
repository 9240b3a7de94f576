"""What a chip sends a step when chips are added and each keeps its rows: MoV-10 on 3B, v5e.

The data axis grows, `fsdp` and `model` stay. Compiled, not run; the bytes are the program's, with
TPU compilers' least effort. The growth from the smallest to the largest slice must stay below 5 per
cent.

    python benchmarks/weak_scaling.py [--targets v5e-16 v5e-64 v5e-256] [--model 4] [--fsdp 1]
        [--rows_per_chip 2] [--output docs/results/weak_scaling.json]
"""

import argparse
from collections.abc import Sequence
import os
from typing import Any

from moe_peft.preflight import hardware

hardware.without_devices(os.environ)

from moe_peft.cli import main as main_lib
from moe_peft.preflight import compiled
from moe_peft.runtime import json_files

LIMIT = 0.05


def compile_for(target: hardware.Target, options: argparse.Namespace) -> compiled.CompiledProgram:
    """The step on all chips of a slice."""
    rows = options.rows_per_chip * target.count
    bindings = (f"BATCH_SIZE={rows}", *options.gin)
    experiment = main_lib.configure("preflight", [options.gin_file], bindings)()
    data = target.count // (options.model * options.fsdp)
    choice = compiled.Choice(data, options.fsdp, options.model, 1, "full")
    return experiment.compile(target, target.devices(), choice, is_quick=True)


def growth(rows: Sequence[dict[str, Any]]) -> float:
    """Of the bytes that a chip sends a step, from the first row to the last, as a fraction."""
    return rows[-1]["sent"] / rows[0]["sent"] - 1.0


def main() -> None:
    """Compiles, prints, saves; exits with 1 if communication grows too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", default="experiments/mov/3b/mov_10.gin")
    parser.add_argument("--gin", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--targets", nargs="+", default=["v5e-16", "v5e-64", "v5e-256"])
    parser.add_argument("--model", type=int, default=4)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--rows_per_chip", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for name in options.targets:
        found = compile_for(hardware.find_target(name), options)
        sent = sum(each.num_bytes for each in found.collectives.values())
        rows.append({"sent": sent, **found.to_json()})
        kinds = ", ".join(f"{k} {c.num_bytes / 1e6:.1f} MB" for k, c in found.collectives.items())
        print(f"{name}: {sent / 1e6:.1f} MB a chip and step ({kinds})", flush=True)
    found = growth(rows)
    print(f"grows by {found:.2%}, {LIMIT:.0%} are allowed")
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        json_files.write_json(options.output, {"settings": settings, "growth": found, "rows": rows})
    raise SystemExit(found >= LIMIT)


if __name__ == "__main__":
    main()
