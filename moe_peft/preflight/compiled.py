"""A program compiled for hardware one does not have, and what it will need there."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
import time
from typing import Any

import jax

from moe_peft.partitioning import hlo_cost
from moe_peft.preflight import hardware

_DOES_NOT_FIT = "exceed"  # in what the TPU compiler says of a program that is too large
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of")
_TEMPORARIES = re.compile(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Of TPU compilers: a third of the time or less, memory and communication some per cent higher.
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What may be changed to make a program fit."""

    data: int  # sizes of the mesh: data, fsdp and model
    fsdp: int
    model: int
    num_microbatches: int  # parts of a batch, one after another
    remat_policy: str  # of `T5Config`

    def __str__(self) -> str:
        mesh = f"data {self.data} x fsdp {self.fsdp} x model {self.model}"
        return f"{mesh}, {self.num_microbatches} micro-batches, remat {self.remat_policy}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function that is to be compiled."""

    function: Any  # jitted
    arguments: Sequence[Any]  # shapes with their shardings
    mesh: jax.sharding.Mesh  # of those
    loops: int = 1  # how often a loop of unknown length runs
    read_again: float = 0.0  # bytes of arguments on a device that each round of such a loop reads


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What is known of one compiled program; bytes and operations are of one chip."""

    choice: Choice  # of it
    target: str  # name of the hardware
    capacity: float  # memory of a chip
    memory: hlo_cost.Memory | None  # planned; None where the compiler refused the program
    needed: float  # bytes; the peak, or what a refusing compiler asked for, 0 if it did not say
    refused: str  # what the compiler said then
    operations: float  # of matrix products
    bytes_accessed: float  # of the chip's memory; loops counted once, as the compiler reports it
    collectives: Mapping[str, hlo_cost.Collective]  # by kind
    # seconds that arithmetic, memory (each argument read) and links need at least; the network
    # between slices is not among them
    bounds: Mapping[str, float]
    compile_seconds: float  # tracing included

    @property
    def fits(self) -> bool:
        """Whether a chip's memory suffices."""
        return self.memory is not None and self.needed <= self.capacity

    @property
    def seconds(self) -> float:
        """A step takes at least that long (roofline)."""
        return max(self.bounds.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        values = {"setting": values.pop("choice"), **values}  # as files of earlier versions have it
        return values | {"fits": self.fits, "seconds_at_least": self.seconds}


def compile_program(
    what: Program, target: hardware.Target, choice: Choice, *, is_quick: bool = False
) -> CompiledProgram:
    """Compiles a program for a target, on whose devices its mesh is; `is_quick`: least effort."""
    started = time.monotonic()
    options = _LEAST_EFFORT if is_quick and target.shape else None
    with jax.set_mesh(what.mesh):
        traced = what.function.trace(*what.arguments)
        operations = hlo_cost.operations(traced, what.loops) / target.count
        try:
            executable, refused = traced.lower().compile(compiler_options=options), ""
        except jax.errors.JaxRuntimeError as error:
            if _DOES_NOT_FIT not in str(error).lower():
                raise
            executable, refused = None, " ".join(str(error).split())[:400]
    memory, collectives, accessed = None, {}, 0.0
    needed = needed_memory(refused, bytes_of_device(what.arguments))
    bounds = {"arithmetic": operations / target.chip.flops}
    if executable is not None:
        memory = hlo_cost.memory(executable)
        needed = memory.peak
        collectives = hlo_cost.collectives(executable.as_text())
        accessed = float((executable.cost_analysis() or {}).get("bytes accessed", 0.0))
        read = memory.arguments + (what.loops - 1) * what.read_again
        sent = (e.num_bytes for k, e in collectives.items() if k != hlo_cost.BETWEEN_SLICES)
        bounds["memory"] = max(read, accessed) / target.chip.bandwidth
        bounds["links"] = sum(sent) / target.chip.link
    there = choice, target.name, target.chip.memory
    costs = memory, needed, refused, operations, accessed, collectives, bounds
    return CompiledProgram(*there, *costs, time.monotonic() - started)


def needed_memory(refusal: str, arguments: int) -> float:
    """Bytes that a compiler asked for when it refused a program; 0 where it did not say.

    Bytes of `arguments` come on top where the refusal speaks of temporaries alone.

    >>> needed_memory("Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 0) / 2**30
    20.5
    """
    for pattern, more in ((_USED, 0), (_TEMPORARIES, arguments)):
        if found := pattern.search(refusal):
            return float(found[1]) * _UNITS[found[2]] + more
    return 0.0


def bytes_of_device(tree: Any) -> int:
    """Bytes that a device holds of arrays or shapes with their shardings."""
    part = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(part, jax.tree.leaves(tree)))
