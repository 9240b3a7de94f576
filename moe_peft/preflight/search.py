"""Meshes, micro-batches and remat policies: reads them, and tries which of them make a step fit."""

from collections.abc import Sequence
import itertools
import math
import sys

from moe_peft import errors
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.preflight import compiled, hardware, programs, view


def meshes(count: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, model) of so many devices, powers of two, `model` at most 16."""
    pairs = itertools.product([2**power for power in range(5)], [2**power for power in range(9)])
    return [(count // (m * f), f, m) for m, f in pairs if count % (m * f) == 0]


def parse_mesh(text: str, count: int) -> tuple[int, int, int]:
    """Reads "data=4,model=4" (data: what is left) for so many devices; a UserError if it is not."""
    sizes = {"fsdp": 1, "model": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        errors.check_one_of("An axis of --mesh", name.strip(), mesh_lib.AXES)
        if not size.isdecimal() or not int(size):
            raise errors.UserError(f"--mesh is {text!r}; expected sizes, as in data=4,model=4.")
        sizes[name.strip()] = int(size)
    data = sizes.get("data", max(count // (sizes["fsdp"] * sizes["model"]), 1))
    if data * sizes["fsdp"] * sizes["model"] != count:
        product = f"{data} x {sizes['fsdp']} x {sizes['model']}"
        raise errors.UserError(f"--mesh {text!r} is {product}, but the target has {count} devices.")
    return data, sizes["fsdp"], sizes["model"]


def by_rule(batch_size: int, weights: tuple[int, int], target: hardware.Target) -> compiled.Choice:
    """A mesh and micro-batches to begin with, without compiling; weights: bytes frozen, trained.

    As many chips as the batch divides over take rows each; the others split layers (`model`). Rows
    are along `data`, or inside a slice along `fsdp` where a copy of the weights, and of the
    gradients of what trains, would fill more than half of a chip. At a time a chip takes one row
    for every two gigabytes that it has, rounded down to a power of two.
    """
    shards = math.gcd(batch_size, target.count)
    model = target.count // shards
    is_split = (weights[0] + 2 * weights[1]) / model > target.chip.memory / 2
    at_a_time = 2 ** int(math.log2(target.chip.memory / 2e9))
    parts = max(batch_size // shards // at_a_time, 1)
    fsdp = shards // target.slices if is_split else 1
    return compiled.Choice(shards // fsdp, fsdp, model, parts, "full")


def search(
    experiment: programs.Experiment,
    target: hardware.Target,
    program: str = "train",
    policies: Sequence[str] = ("minimal", "full"),
    microbatches: Sequence[int] = (1, 2, 4),
    *,
    is_quick: bool = False,
) -> list[compiled.CompiledProgram]:
    """Compiles what may fit, and ranks it: what fits first, by the bound on the step's time.

    For every mesh, less and less memory is asked for until the step fits. Evaluation has neither
    micro-batches nor anything to compute again.
    """
    if program != "train":
        policies, microbatches = ("none",), (1,)
    devices, found = target.devices(), []
    for shape in meshes(target.count):
        for parts, policy in itertools.product(microbatches, policies):
            choice = compiled.Choice(*shape, parts, policy)
            try:
                made = experiment.compile(target, devices, choice, program, is_quick=is_quick)
            except errors.UserError as error:
                print(f"{choice}: {error}", file=sys.stderr, flush=True)
                break
            found.append(made)
            print(f"{choice}: {view.summary(made)}", file=sys.stderr, flush=True)
            if made.fits:
                break
    return sorted(found, key=lambda made: (not made.fits, made.seconds))
