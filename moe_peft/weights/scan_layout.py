"""The two layouts of a network's leaves, and the way from one to the other, leaf by leaf.

Unscanned: `encoder/layers_3/attention/query/kernel` [d, h * k], one position bias per stack or, in
UMT5, one per layer.
Scanned: `encoder/encoder/attention/query/kernel` [d, layers, h, k], a bias in every layer.
"""

from collections.abc import Mapping, Sequence
import re

import numpy as np

from moe_peft import errors
from moe_peft.patching import trees
from moe_peft.weights import leaves

_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.*)")
BIAS = "relpos_bias/rel_embedding"


def is_scanned(paths: Mapping[str, object]) -> bool:
    """Whether the leaves are those of a network with scanned layers."""
    return any(trees.stack(path) for path in paths)


def has_biases_in_layers(paths: Mapping[str, object]) -> bool:
    """Whether the leaves are those of an unscanned network with position biases in every layer."""
    return any(path.endswith(f"/{BIAS}") and _LAYER.fullmatch(path) for path in paths)


def convert(
    found: Mapping[str, leaves.Leaf], scanned: bool, biases_in_layers: bool = False
) -> leaves.Leaves:
    """Returns the leaves in the layout asked for; nothing is read.

    Args:
      found: leaves by path, in either layout.
      scanned: the layout asked for.
      biases_in_layers: an unscanned network has position biases in every layer, not one per stack.

    Raises:
      UserError: a scanned network has learned other position biases in other layers, which an
        unscanned one cannot have. Found out when the bias is read.
    """
    if is_scanned(found) == scanned:
        return dict(found)
    return _scanned(found) if scanned else _unscanned(found, biases_in_layers)


def _scanned(found: Mapping[str, leaves.Leaf]) -> leaves.Leaves:
    result, stacks = {}, {}
    for path, leaf in found.items():
        layer = _LAYER.fullmatch(path)
        if layer:
            stack, index, rest = layer.groups()
            stacks.setdefault(f"{stack}/{stack}/{rest}", {})[int(index)] = leaf
        elif not path.endswith(BIAS):
            result[path] = leaf
    heads = {stack: _bias(found, stack).shape[0] for stack in ("encoder", "decoder")}
    for path, layers in stacks.items():
        stack = path.split("/")[0]
        split = [_split_heads(path, layers[i], heads[stack]) for i in sorted(layers)]
        result[path] = _stacked(split)
    for stack in heads:
        if f"{stack}/{BIAS}" not in found:  # it came with the layers
            continue
        num_layers = 1 + max(int(m[2]) for m in map(_LAYER.fullmatch, found) if m and m[1] == stack)
        result[f"{stack}/{stack}/{BIAS}"] = _stacked([_bias(found, stack)] * num_layers)
    return result


def _bias(found: Mapping[str, leaves.Leaf], stack: str) -> leaves.Leaf:
    """Its first axis also says how many heads the stack has."""
    path = f"{stack}/{BIAS}"
    bias = found.get(path, found.get(f"{stack}/layers_0/{BIAS}"))
    if bias is None:
        raise errors.UserError(f"Layers cannot be stacked: there is no {path}.")
    return bias


def unscanned_paths(path: str, shape: Sequence[int]) -> list[str]:
    """Returns the paths in the unscanned tree of what a leaf holds, layer by layer."""
    stack = trees.stack(path)
    if stack is None:
        return [path]
    coder, rest = stack.split("/")[0], path.removeprefix(f"{stack}/")
    return [f"{coder}/layers_{index}/{rest}" for index in range(shape[trees.LAYER_AXIS])]


def _unscanned(found: Mapping[str, leaves.Leaf], biases_in_layers: bool) -> leaves.Leaves:
    result, stacks = {}, _LastRead()
    for path, leaf in found.items():
        if trees.stack(path) is None:
            result[path] = leaf
            continue
        shape = _without_layers(leaf.shape)
        if path.endswith(f"/{BIAS}") and not biases_in_layers:
            one = f"{path.split('/')[0]}/{BIAS}"
            result[one] = leaves.mapped(leaf, shape, lambda x, leaf=leaf: _the_same(x, leaf))
            continue
        shape = _merged_shape(path, shape)
        for index, one in enumerate(unscanned_paths(path, leaf.shape)):
            read = lambda leaf=leaf, index=index, shape=shape: np.take(
                stacks.read(leaf), index, trees.LAYER_AXIS
            ).reshape(shape)
            result[one] = leaves.Leaf(shape, leaf.dtype, read, f"{leaf.source}[:, {index}]")
    return result


class _LastRead:
    """Keeps the stack that was read last: its layers are asked for one after the other."""

    def __init__(self):
        self._leaf, self._values = None, None

    def read(self, leaf: leaves.Leaf) -> np.ndarray:
        if leaf is not self._leaf:
            self._values = None  # before the next is read
            self._leaf, self._values = leaf, leaf.read()
        return self._values


def _stacked(layers: Sequence[leaves.Leaf]) -> leaves.Leaf:
    first, axis = layers[0], trees.LAYER_AXIS
    shape = (*first.shape[:axis], len(layers), *first.shape[axis:])
    odd = [leaf for leaf in layers if leaf.shape != first.shape]
    if odd:
        raise errors.UserError(
            f"Layers cannot be stacked: {first.source} is {first.shape}, {odd[0].source} is "
            f"{odd[0].shape}."
        )

    def read():
        values = np.empty(shape, first.dtype)
        for index, leaf in enumerate(layers):
            values[(slice(None),) * axis + (index,)] = leaf.read()
        return values

    return leaves.Leaf(shape, first.dtype, read, first.source)


def _split_heads(path: str, leaf: leaves.Leaf, heads: int) -> leaves.Leaf:
    shape = leaf.shape
    if re.search("/(query|key|value)/kernel$", path):
        shape = (shape[0], heads, shape[1] // heads)
    elif path.endswith("/out/kernel"):
        shape = (heads, shape[0] // heads, shape[1])
    return leaves.mapped(leaf, shape, lambda x: x.reshape(shape))


def _merged_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if re.search("/(query|key|value)/kernel$", path):
        return shape[0], shape[1] * shape[2]
    if path.endswith("/out/kernel"):
        return shape[0] * shape[1], shape[2]
    return shape


def _without_layers(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[: trees.LAYER_AXIS], *shape[trees.LAYER_AXIS + 1 :])


def _the_same(biases: np.ndarray, leaf: leaves.Leaf) -> np.ndarray:
    first = np.take(biases, 0, trees.LAYER_AXIS)
    if not np.array_equal(biases, np.broadcast_to(first[:, None], biases.shape)):
        raise errors.UserError(
            f"{leaf.source} differs from layer to layer: an unscanned network has one position "
            "bias per stack. Use it with T5Config.scan_layers = True, or with "
            "T5Config.relpos_in_every_layer = True."
        )
    return first
