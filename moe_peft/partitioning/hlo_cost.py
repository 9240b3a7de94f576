"""What a compiled program costs: operations, memory, and what devices send each other."""

import collections
from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
from jax.extend import core

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BETWEEN_SLICES = "between slices"
_BETWEEN_SLICES = re.compile(r" = (.*?) send\(.*_xla_megascale_transfer_type=")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs."""

    arguments: int  # what it is given
    temporaries: int  # what it needs in between
    peak: int  # all at once


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication in a program."""

    count: int  # how often a device takes part
    num_bytes: int  # of the results on a device, all together


def memory(compiled: jax.stages.Compiled) -> Memory:
    """As the compiler planned it."""
    found = compiled.memory_analysis()
    peak = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, peak)


def operations(traced: jax.stages.Traced, loops: int = 1) -> float:
    """Floating-point operations of a function's matrix products, those in loops as often as run.

    Two for each multiply-add; what rematerialisation computes again counts again.

    Args:
      traced: what `jax.jit(function).trace(...)` returns.
      loops: how often a loop runs whose length is not known.
    """
    return _operations(traced.jaxpr.jaxpr, loops)


def _operations(jaxpr: core.Jaxpr, loops: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += max(_operations(branch.jaxpr, loops) for branch in params["branches"])
        else:
            times = {"scan": params.get("length"), "while": loops}.get(name, 1)
            inner = [_as_jaxpr(value) for value in params.values()]
            total += times * sum(_operations(found, loops) for found in inner if found is not None)
    return total


def _as_jaxpr(value: Any) -> core.Jaxpr | None:
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None


def collectives(text: str) -> dict[str, Collective]:
    """Communication of one device by kind, in a program's optimised HLO text.

    What stands in a loop of known length counts as often as the loop runs. What leaves a slice of
    TPUs is of the kind `BETWEEN_SLICES`.
    """
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    entry = current = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    _count(entry, 1, bodies, found)
    return {kind: Collective(*numbers) for kind, numbers in sorted(found.items())}


def _count(name: str, times: int, bodies: Mapping[str, list[str]], found) -> None:
    for line in bodies.get(name, ()):
        if collective := _COLLECTIVE.search(line):
            kind = found[collective[2]]
            kind[0] += times
            kind[1] += times * _result_bytes(collective[1], "-start(" in line)
        elif leaving := _BETWEEN_SLICES.search(line):
            kind = found[BETWEEN_SLICES]
            kind[0] += times
            kind[1] += times * _result_bytes(leaving[1], is_asynchronous=True)
        inside = times * _trips(line, bodies)
        for called in _CALLED.findall(line):
            _count(called, inside, bodies, found)
        for branches in _BRANCHES.findall(line):
            for branch in branches.split(", "):
                _count(branch.lstrip("%"), inside, bodies, found)


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often the body of a loop runs; 1 for other lines, and where nothing says."""
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    if known := _TRIPS.search(line):
        return int(known[1])
    limits = [int(n) for each in bodies[condition[1]] for n in _LIMIT.findall(each)]
    return limits[0] if len(limits) == 1 else 1


def _result_bytes(shapes: str, is_asynchronous: bool) -> int:
    """Bytes of a result; an asynchronous one names its operands first."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in _ARRAY.findall(shapes)
    ]
    return max(sizes, default=0) if is_asynchronous else sum(sizes)
