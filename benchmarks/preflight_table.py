"""Compiles the papers' configurations for TPUs and GPUs that are not there, and keeps the figures.

T5 1.1 of 770M, 3B and 11B weights, with the settings of experiments/mov: P3 in packed batches of 32
rows of 1024 and 256 tokens, 256 rows for full fine-tuning, unpacked for MHR-64; on v5e-16, v5e-256,
v4-256, one and eight H100s. `preflight.search.by_rule` chooses meshes and micro-batches, and all
layers are rematerialised. TPU compilers are asked for their least effort. A row that is in the file
with the same settings and the same compiler is kept.

    python benchmarks/preflight_table.py [--output docs/results/preflight.json] [--methods mov_10]
        [--sizes 3b] [--targets v5e-16] [--again] [--compare] [--markdown]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
from typing import Any

from moe_peft.preflight import hardware

hardware.without_devices(os.environ)

import jax

from moe_peft import errors
from moe_peft.cli import main as main_lib
from moe_peft.preflight import compiled, programs, search, view
from moe_peft.runtime import json_files

SIZES = ("770m", "3b", "11b")
TARGETS = ("v5e-16", "h100:1", "h100:8", "v5e-256", "v4-256")
# File of the method, and what the experiment's own files add to it.
METHODS = {
    "ia3": ("ia3", ()),
    "lora": ("lora", ()),
    "mov_10": ("mov", ("mov.num_experts=10",)),
    "mov_30": ("mov", ("mov.num_experts=30",)),
    "mov_60": ("mov", ("mov.num_experts=60",)),
    "molora_10": ("molora", ("molora.num_experts=10",)),
    "molora_15": ("molora", ("molora.num_experts=15",)),
    "mhr_64": ("mhr", ("mhr.num_splits=64", "train.pack=False")),
    "full": ("full", ("BATCH_SIZE=256",)),
}
DEFAULT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "preflight.json"
TOLERANCE = 0.02
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: str
    method: str
    target: str

    def experiment(self) -> programs.Experiment:
        """Reads its settings."""
        file, bindings = METHODS[self.method]
        files = (f"experiments/mov/{self.size}/common.gin", f"methods/{file}.gin")
        return main_lib.configure("preflight", files, bindings)()

    def planned(self) -> tuple[programs.Experiment, compiled.Choice, str]:
        """The experiment, its choice by the rule, and a digest of all that decides the outcome."""
        experiment = self.experiment()
        target = hardware.find_target(self.target)
        choice = search.by_rule(experiment.batch_size, experiment.weight_bytes(), target)
        place = {"name": target.name, "chip": dataclasses.asdict(target.chip)}
        place |= {"count": target.count, "shape": target.shape}
        decides = [experiment.describe(), dataclasses.asdict(choice), place]
        text = json.dumps(decides, sort_keys=True, default=str)
        return experiment, choice, hashlib.sha256(text.encode()).hexdigest()[:16]

    def compile(self, xla_flags: str = "") -> Row:
        """Compiles it, once in a process; the row of the table."""
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
        experiment, choice, digest = self.planned()
        target = hardware.find_target(self.target)
        found = experiment.compile(target, target.devices(), choice, is_quick=True)
        print(f"{self.size} {self.method} {self.target}, {choice}:", view.summary(found))
        sys.stdout.flush()
        row = dataclasses.asdict(self) | found.to_json()
        return row | {
            "settings": digest,
            "compiler": compiler(self.target),
            "xla_flags": xla_flags,
        }


def compiler(target: str) -> str:
    """Versions that figures depend on."""
    package = "jax-cuda12-pjrt" if target.startswith("h100") else "libtpu"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "missing"
    return f"jax {jax.__version__}, {package} {version}"


def cases(
    sizes: Sequence[str] = SIZES,
    methods: Sequence[str] = tuple(METHODS),
    places: Sequence[str] = TARGETS,
) -> list[Case]:
    """Rows, target by target."""
    found = itertools.product(places, sizes, methods)
    return [Case(size, method, target) for target, size, method in found]


def read(path: pathlib.Path) -> dict[Case, Row]:
    """The rows of a file by their case; none where there is no file."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return {Case(row["size"], row["method"], row["target"]): row for row in rows}


def add(path: pathlib.Path, case: Case, row: Row) -> None:
    """Writes one row into the file, in place of an earlier one."""
    rows = read(path) | {case: row}
    order = {each: number for number, each in enumerate(cases())}
    kept = [rows[each] for each in sorted(rows, key=order.__getitem__)]
    json_files.write_json(path, {"rows": kept})


def fill(path: pathlib.Path, wanted: Sequence[Case], is_again: bool = False) -> None:
    """Compiles the wanted rows that the file lacks, or has with other settings.

    Each in a process of its own: some programs end the GPU's compiler by a failed assertion. Those
    are compiled without Triton's matrix products.
    """
    for case in wanted:
        if in_child(_fill_one, path, case, is_again) < 0:
            print(f"{case}: the compiler crashed", flush=True)
            in_child(_fill_one, path, case, is_again, NO_TRITON)


def in_child(function: Callable[..., None], *args: Any) -> int:
    """Runs it in a process of its own; the exit code, or minus the signal that ended it."""
    # Forked, which is quick: nothing has started jax's threads in this process.
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join()
    return child.exitcode


def _fill_one(path: pathlib.Path, case: Case, is_again: bool, xla_flags: str = "") -> None:
    known = read(path).get(case)
    if known and not is_again:
        current = (case.planned()[2], compiler(case.target))
        if (known["settings"], known["compiler"]) == current:
            return
    add(path, case, case.compile(xla_flags))


def differences(old: Row, new: Row) -> list[str]:
    """What differs between two compilations of one case; nothing if it is within `TOLERANCE`."""
    found = [] if old["settings"] == new["settings"] else ["the settings changed"]
    sent = lambda row: {kind: each["num_bytes"] for kind, each in row["collectives"].items()}
    figures = lambda row: {name: row[name] for name in ("needed", "operations")} | sent(row)
    was, now = figures(old), figures(new)
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name, 0), now.get(name, 0)
        if abs(after - before) > TOLERANCE * max(before, after):
            found.append(f"{name}: {before:.4g} before, {after:.4g} now")
    return found


def compare(path: pathlib.Path, wanted: Sequence[Case]) -> bool:
    """Compiles the wanted rows that the file has again; whether all came out the same."""
    rows = read(path)
    codes = [in_child(_compare_one, rows[case], case) for case in wanted if case in rows]
    return not any(codes)


def _compare_one(row: Row, case: Case) -> None:
    found = differences(row, case.compile(row["xla_flags"]))
    print("  as in the file" if not found else "  " + "; ".join(found), flush=True)
    sys.exit(bool(found))


def markdown(rows: Mapping[Case, Row]) -> str:
    """The table of docs/scaling.md: peak GB of a chip, and milliseconds that a step needs at least.

    What does not fit says by how much instead; * marks what was compiled without Triton.
    """
    lines = [
        "| | " + " | ".join(TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for size, method in itertools.product(SIZES, METHODS):
        found = [rows.get(Case(size, method, target)) for target in TARGETS]
        if any(found):
            lines.append(f"| {size} {method} | " + " | ".join(map(_cell, found)) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row["fits"]:
        return f"{(row['needed'] - row['capacity']) / 1e9:.2f} GB too many"
    mark = "*" if row["xla_flags"] else ""
    return f"{row['needed'] / 1e9:.1f}{mark}, {row['seconds_at_least'] * 1e3:.0f} ms"


def main() -> None:
    """Fills the table, or prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=DEFAULT)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--again", action="store_true", help="compile rows that are there too")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compile rows that are there, write nothing, exit with 1 if memory, communication or "
        "operations differ by more than 2 per cent",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table, compile nothing")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(read(options.output)))
        return
    try:
        wanted = cases(options.sizes, options.methods, options.targets)
        if options.compare:
            sys.exit(not compare(options.output, wanted))
        fill(options.output, wanted, options.again)
    except errors.UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
