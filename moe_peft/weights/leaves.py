"""Arrays that are read when they are asked for, so that a model is never in memory twice."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import ml_dtypes
import numpy as np

from moe_peft import errors, patching

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype("float32"), "bfloat16": BFLOAT16}

Sharding = jax.sharding.Sharding
ShardingOf = Callable[[str, tuple[int, ...]], Sharding]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # returns the values, from the file every time
    source: str  # file and key, for messages

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values."""
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=False)


Leaves = dict[str, Leaf]


def flatten(params: PyTree) -> Leaves:
    """Returns {"encoder/layers_0/...": leaf} of a tree of arrays or of leaves."""
    return {path: from_array(leaf, path) for path, leaf in patching.flatten(params).items()}


def from_array(array: Any, source: str) -> Leaf:
    """Returns an array in memory as a leaf; a leaf as it is."""
    if isinstance(array, Leaf):
        return array
    dtype = np.dtype(array.dtype)
    return Leaf(tuple(array.shape), dtype, lambda: np.asarray(jax.device_get(array)), source)


def mapped(leaf: Leaf, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Leaf:
    """Returns the leaf with another shape, changed by `change` after it is read."""
    return dataclasses.replace(leaf, shape=shape, read=lambda: change(leaf.read()))


def check_dtype(dtype: str) -> None:
    """Raises UserError unless weights can be stored so."""
    errors.check_one_of("The dtype of weights", dtype, DTYPES)


def is_cast(leaf: Any, dtype: str | None) -> bool:
    """Whether `cast` changes an array or a leaf: one of floating point and another dtype."""
    if dtype is None:
        return False
    check_dtype(dtype)
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != DTYPES[dtype]


def cast(array: Any, dtype: str | None) -> Any:
    """Returns floating-point values as "float32" or "bfloat16"; None and integers as they are."""
    return array.astype(DTYPES[dtype]) if is_cast(array, dtype) else array


def cast_tree(params: PyTree, dtype: str) -> PyTree:
    """Returns the tree with its floating-point leaves in "float32" or "bfloat16"."""
    check_dtype(dtype)  # also of an empty tree
    return jax.tree.map(lambda leaf: cast(leaf, dtype), params)


def cast_when_read(leaf: Leaf, dtype: str | None) -> Leaf:
    """Returns the leaf cast to "float32" or "bfloat16" when it is read; None keeps its own."""
    read = lambda: cast(leaf.read(), dtype)
    is_other = is_cast(leaf, dtype)
    return dataclasses.replace(leaf, dtype=DTYPES[dtype], read=read) if is_other else leaf


def load(
    found: Mapping[str, Leaf],
    dtype: str | None = None,
    sharding: Sharding | ShardingOf | None = None,
) -> PyTree:
    """Reads leaf by leaf, casts, and places each where it belongs before the next is read.

    `sharding` is that of every leaf, or a function from path and shape to it; None gives NumPy
    arrays.
    """

    def place(path: str, array: np.ndarray) -> Any:
        if sharding is None:
            return np.ascontiguousarray(array)
        target = sharding if isinstance(sharding, Sharding) else sharding(path, array.shape)
        piece = lambda index: np.ascontiguousarray(array[index])
        return jax.make_array_from_callback(array.shape, target, piece)

    placed = {path: place(path, cast(leaf.read(), dtype)) for path, leaf in found.items()}
    return patching.trees.unflatten(placed)


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
