"""Hardware that need not be there: TPU topologies and GPUs that programs can be compiled for.

TPU topologies come from libtpu (`pip install libtpu`), H100s from jax's CUDA plugins without CUDA
(`pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`, of jax's own version). Neither needs a
device. Other figures of chips are their makers' data sheets.

Nothing here imports jax before it is needed: `without_devices` has to be called first.
"""

from collections.abc import MutableMapping, Sequence
import dataclasses
import math
import re
from typing import Any

from moe_peft import errors
from moe_peft.runtime import tensorflow_logs


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a kind, by its data sheet."""

    name: str  # as people write it
    memory: float  # bytes for programs: TPUs' by libtpu's refusals, where data sheets say more
    flops: float  # bfloat16 operations per second
    bandwidth: float  # of the memory, bytes per second
    link: float  # bytes per second that a chip can send to others
    per_host: int  # devices of one machine


CHIPS = {
    "v4": Chip("v4", 30.75 * 2**30, 275e12, 1228e9, 300e9, 4),
    "v5e": Chip("v5e", 15.75 * 2**30, 197e12, 819e9, 200e9, 4),
    "v5p": Chip("v5p", 95.74 * 2**30, 459e12, 2765e9, 600e9, 4),
    "v6e": Chip("v6e", 31.25 * 2**30, 918e12, 1640e9, 448e9, 4),
    "h100": Chip("h100", 84_942_979_072, 989e12, 3352e9, 450e9, 8),
}
# Topologies by the number of chips, as clouds sell them.
_FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
_CUBES = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"]
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}
# A chip of v4 has two cores. Programs use them as one device, unless it is told otherwise.
_ONE_DEVICE_A_CHIP = {"v4": {"chip_config_name": "megacore"}}
# XLA's description of an H100 SXM of 80 GB, in protobuf's text form.
_H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    name: str  # such as "v5e:4x4" or "h100:8"
    chip: Chip  # of which there are `count`
    count: int
    shape: str  # of the topology of a slice; empty for GPUs
    slices: int = 1  # of so many chips together, joined by the data centre's network

    def devices(self) -> Sequence[Any]:
        """Descriptions of the devices, for a mesh; a UserError if no plugin here knows them."""
        import jax
        from jax.experimental import topologies

        try:
            if self.shape:
                name, platform = f"{self.chip.name}:{self.shape}", "tpu"
                options = dict(_ONE_DEVICE_A_CHIP.get(self.chip.name, {}))
                options |= {"num_slices": self.slices} if self.slices > 1 else {}
            else:
                name, platform = f"1x1x{self.count}", "cuda"
                options = {"topology": name, "target_config": _H100}
            found = topologies.get_topology_desc(name, platform=platform, **options)
        except Exception as error:
            reason = str(error).splitlines()[0][:160]
            wanted = "libtpu" if self.shape else "--no-deps jax-cuda12-plugin jax-cuda12-pjrt"
            raise errors.UserError(
                f"Nothing here can compile for {self.name} ({reason}). Is it a topology of that "
                f"chip, and is its compiler installed (pip install {wanted}, of jax "
                f"{jax.__version__})?"
            ) from error
        return found.devices


def find_target(name: str, slices: int = 1) -> Target:
    """Returns "v5e:4x4", "v5e-16" (as many chips) or "h100:8", TPUs in slices; or a UserError."""
    wrong = lambda what: errors.UserError(f"--target is {name!r}; {what}.")
    form = re.fullmatch(r"(\w+)[:-](\d+(?:x\d+)*)", name)
    if not form:
        examples = "such as v5e:4x4, v5e-256 or h100:8"
        raise wrong(f"expected a chip and its topology or number, {examples}")
    kind, shape = form.groups()
    errors.check_one_of("The chip of --target", kind, CHIPS)
    if slices < 1 or (slices > 1 and kind == "h100"):
        raise errors.UserError(
            f"--slices is {slices} for {name}; expected a number of slices of TPUs, at least 1."
        )
    if kind == "h100":
        if "x" in shape:
            raise wrong("expected a number, such as h100:8")
        return Target(name, CHIPS[kind], int(shape), "")
    if "x" not in shape:
        sizes = {_size(each): each for each in _SHAPES[kind]}
        if int(shape) not in sizes:
            example = f"{kind}:{next(iter(sizes.values()))}"
            known = f"slices of {kind} have {', '.join(map(str, sizes))} chips"
            raise wrong(f"{known}, or name a topology as in {example}")
        shape = sizes[int(shape)]
    return Target(name, CHIPS[kind], _size(shape) * slices, shape, slices)


def _size(shape: str) -> int:
    """
    >>> _size("2x2x4")
    16
    """
    return math.prod(map(int, shape.split("x")))


def without_devices(environ: MutableMapping[str, str]) -> None:
    """Keeps jax on the CPU, and tells libtpu what it would otherwise ask a TPU's machine for."""
    environ.setdefault("JAX_PLATFORMS", "cpu")
    environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # It compiles, next to whoever trains.
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    tensorflow_logs.answer_libtpu(environ)
