"""Where the arrays of a run lie: from names of their axes to axes of the mesh.

Parameters and activations name their axes ("embed", "mlp", "heads", ...). Rules say along which
axis of the mesh a named one is split: batches and, of every weight, the model's width over `fsdp`;
heads, the feed-forward width and the vocabulary over `model`. Whatever no rule names has a whole
copy on every device. The compiler adds the communication that follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax.linen import partitioning
import gin
import jax
from jaxtyping import PyTree

from moe_peft import errors, patching
from moe_peft.partitioning import mesh as mesh_lib

# The first rule of a name counts; an axis of the mesh splits an array once.
LOGICAL_AXIS_RULES = (
    ("batch", mesh_lib.BATCH_AXES),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
)
ADAPTERS = ("replicated", "sharded")

Axes = Mapping[str, tuple[str | None, ...]]


@gin.configurable(module="partitioning", denylist=["mesh"])
@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which arrays are split over it."""

    mesh: jax.sharding.Mesh  # with the axes `data`, `fsdp` and `model`
    # rules (logical axis, axis or axes of the mesh, or None) that come before `LOGICAL_AXIS_RULES`;
    # adapters' axes are "expert", "rank", "task", "skill" and "split", besides those of the layer
    # they belong to
    first: Sequence[tuple[str, str | Sequence[str] | None]] = ()
    # "replicated" keeps a whole copy of adapters and their optimiser state on every device;
    # "sharded" splits them as the rules say
    adapters: str = "replicated"

    def __post_init__(self) -> None:
        errors.check_one_of("Layout.adapters", self.adapters, ADAPTERS)
        for name, axes in self.first:
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                errors.check_one_of(f"Layout.first: the axis of {name!r}", axis, mesh_lib.AXES)

    @property
    def rules(self) -> tuple[tuple[str, Any], ...]:
        """All rules, in order."""
        given = ((name, tuple(a) if isinstance(a, list) else a) for name, a in self.first)
        return (*given, *LOGICAL_AXIS_RULES)

    @property
    def replicated(self) -> jax.sharding.NamedSharding:
        """A whole copy on every device."""
        return mesh_lib.replicated(self.mesh)

    def shardings(self, tree: PyTree, axes: Axes) -> PyTree:
        """Returns the sharding of every parameter of a nested dict.

        Args:
          tree: arrays, or their shapes.
          axes: names of the axes of parameters by path; one that is missing is not split.

        Raises:
          UserError: the mesh does not divide an axis.
        """
        flat = patching.flatten(tree)
        found = {path: self._sharding(path, leaf.shape, axes) for path, leaf in flat.items()}
        return patching.trees.unflatten(found)

    def optimizer_shardings(self, tree: PyTree, shardings: PyTree, parameters: PyTree) -> PyTree:
        """Returns the shardings of a tree of parameters and of what an optimiser keeps of them.

        A leaf whose dictionary keys end in a parameter's path and that has its shape (or the shape
        with the axis of scanned layers first) lies where that does; any other has a whole copy on
        every device.

        Args:
          tree: arrays or shapes.
          shardings: of the parameters, a nested dict.
          parameters: the same with arrays or shapes.
        """
        places, shapes = patching.flatten(shardings), patching.flatten(parameters)

        def place(path, leaf):
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            ends = ("/".join(keys[first:]) for first in range(len(keys)))
            name = next((end for end in ends if end in shapes), None)
            if name is None:
                return self.replicated
            shape, spec = shapes[name].shape, places[name].spec
            if shape == leaf.shape:
                return places[name]
            if _layers_first(shape) == leaf.shape:
                spec = _layers_first((*spec, *[None] * (len(shape) - len(spec))))
                return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*spec))
            return self.replicated

        return jax.tree_util.tree_map_with_path(place, tree)

    def with_axis_rules(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with activations split by the rules too; to be jitted."""

        @functools.wraps(function)
        def inside(*args, **kwargs):
            with partitioning.axis_rules(self.rules if self.mesh.size > 1 else ()):
                return function(*args, **kwargs)

        return inside

    def _sharding(self, path: str, shape: tuple[int, ...], axes: Axes):
        is_adapter = patching.is_adapter(path)
        if path not in axes or (is_adapter and self.adapters == "replicated"):
            return self.replicated
        spec = partitioning.logical_to_mesh_axes(axes[path], self.rules)
        for name, size, split in zip(axes[path], shape, spec, strict=True):
            split = (split,) if isinstance(split, str) else split or ()
            parts = math.prod(self.mesh.shape[axis] for axis in split)
            if size % parts:
                raise errors.UserError(
                    f"A mesh with {' x '.join(split)} = {parts} cannot divide {path}: its axis "
                    f"{name!r} is {size} long. Choose a size of the mesh that divides it"
                    + (", or Layout.adapters='replicated'." if is_adapter else ".")
                )
        return jax.sharding.NamedSharding(self.mesh, spec)


def _layers_first(axes: tuple) -> tuple:
    """The axes as optimisers that go over layers one by one keep them."""
    layer = patching.trees.LAYER_AXIS
    return (*axes[layer : layer + 1], *axes[:layer], *axes[layer + 1 :])


def logical_axes(variables: PyTree) -> dict[str, tuple[str | None, ...]]:
    """Names of the axes of every parameter, by path.

    Args:
      variables: {"params": ..., "params_axes": ...} as a module's `init` makes them, or shapes.
    """
    flat = patching.flatten(partitioning.get_axis_names(variables.get("params_axes", {})))
    return {path: tuple(names) for path, names in flat.items()}
