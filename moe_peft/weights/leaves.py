"""Arrays that are read when they are asked for, so that a model is never in memory twice."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
from jaxtyping import PyTree
import ml_dtypes
import numpy as np

from moe_peft import errors, patching
from moe_peft.weights import report

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype("float32"), "bfloat16": BFLOAT16}

Sharding = jax.sharding.Sharding
ShardingOf = Callable[[str, tuple[int, ...]], Sharding]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in a file.

    Attributes:
      shape: as `read` returns it.
      dtype: likewise.
      read: returns the values, every time from the file.
      source: file and key, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values."""
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=False)


Leaves = dict[str, Leaf]


def flatten(params: PyTree) -> Leaves:
    """Returns {"encoder/layers_0/...": leaf} of a tree of arrays or of leaves."""
    return {path: of(leaf, path) for path, leaf in patching.flatten(params).items()}


def of(array: Any, source: str) -> Leaf:
    """Returns an array in memory as a leaf; a leaf as it is."""
    if isinstance(array, Leaf):
        return array
    dtype = np.dtype(array.dtype)
    return Leaf(tuple(array.shape), dtype, lambda: np.asarray(jax.device_get(array)), source)


def mapped(leaf: Leaf, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Leaf:
    """Returns the leaf with another shape, changed by `change` after it is read."""
    return dataclasses.replace(leaf, shape=shape, read=lambda: change(leaf.read()))


def cast(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Returns floating-point values as "float32" or "bfloat16"; None and integers as they are."""
    if dtype is None or not _is_float(array.dtype):
        return array
    return array.astype(DTYPES[dtype], copy=False)


def stored_as(leaf: Leaf, dtype: str | None) -> Leaf:
    """Returns the leaf cast to "float32" or "bfloat16" when it is read; None keeps its own."""
    if dtype is None or not _is_float(leaf.dtype):
        return leaf
    return dataclasses.replace(leaf, dtype=DTYPES[dtype], read=lambda: cast(leaf.read(), dtype))


def check_dtype(dtype: str | None) -> None:
    """Raises UserError unless weights can be read as `dtype`."""
    if dtype is not None and dtype not in DTYPES:
        raise errors.UserError(
            f"Weights are read as {' or '.join(DTYPES)}, got {dtype!r}."
            f"{errors.near(str(dtype), DTYPES)}"
        )


def load(
    found: Mapping[str, Leaf],
    dtype: str | None = None,
    sharding: Sharding | ShardingOf | None = None,
) -> PyTree:
    """Reads leaf by leaf, casts, and places each where it belongs before the next is read.

    Args:
      found: by path.
      dtype: "float32", "bfloat16"; None keeps each leaf's own.
      sharding: of every leaf, or a function from path and shape to it; None for NumPy arrays.
    """
    check_dtype(dtype)
    return patching.trees.unflatten(
        {path: _place(path, cast(leaf.read(), dtype), sharding) for path, leaf in found.items()}
    )


def casts(found: Mapping[str, Leaf], dtype: str | None) -> dict[str, report.Cast]:
    """Returns what `load` will cast, by path."""
    return {
        path: (leaf.dtype.name, dtype)
        for path, leaf in found.items()
        if dtype is not None and _is_float(leaf.dtype) and leaf.dtype.name != dtype
    }


def spread(mesh: jax.sharding.Mesh) -> ShardingOf:
    """Returns the rule that splits a leaf's widest axis over the mesh axes fsdp and model.

    An axis that the devices do not divide evenly is passed over; a leaf with no other, such as a
    norm's scale, is copied to every device.
    """
    axes = ("fsdp", "model")
    parts = math.prod(mesh.shape[axis] for axis in axes)

    def sharding(path: str, shape: tuple[int, ...]) -> Sharding:
        del path
        spec = [None] * len(shape)
        even = [axis for axis, size in enumerate(shape) if size % parts == 0 and len(shape) > 1]
        if even and parts > 1:
            spec[max(even, key=lambda axis: shape[axis])] = axes
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return sharding


def _place(path: str, array: np.ndarray, sharding: Sharding | ShardingOf | None) -> Any:
    if sharding is None:
        return np.ascontiguousarray(array)
    target = sharding if isinstance(sharding, Sharding) else sharding(path, array.shape)
    piece = lambda index: np.ascontiguousarray(array[index])
    return jax.make_array_from_callback(array.shape, target, piece)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16
