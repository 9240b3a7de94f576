"""Trained leaves layer by layer, as the unscanned network has them, and back into a tree."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import re
from typing import Any

import numpy as np

from moe_peft import errors, methods, patching
from moe_peft.models import t5
from moe_peft.training import start as start_lib
from moe_peft.weights import identity, leaves, merging, saved_run, scan_layout

Arrays = dict[str, np.ndarray]
Layers = dict[str, Arrays]
Shapes = Mapping[str, tuple[int, ...]]

_ADAPTER = f"/{patching.ADAPTER}/"
BATCH_SHAPES = {**dict.fromkeys(merging.TOKENS, (1, 2)), "task_ids": (1,)}  # of any batch


@dataclasses.dataclass(frozen=True)
class _Described:
    """A method that equals those of the same description."""

    text: str
    method: methods.Method = dataclasses.field(compare=False)


def shapes_of(method: methods.Method, network: t5.Transformer) -> Shapes:
    """Returns the shape of every leaf that a run of the method on the network trains."""
    return _shapes_of(_Described(json.dumps(identity.as_json(method.describe())), method), network)


@functools.lru_cache(maxsize=64)  # tracing takes half a second, and a folder is read again
def _shapes_of(described, network):
    start = start_lib.Start.of_network(network, described.method, BATCH_SHAPES)
    trainable = start.trainable_shapes()
    return {path: leaf.shape for path, leaf in patching.flatten(trainable).items()}


def by_layer(saved: saved_run.Saved) -> Layers:
    """Returns {"encoder/layers_0/attention/key": {"lora_a": array, ...}}, float32.

    Routers that several layers share are left out.
    """
    found: Layers = {}
    for path, leaf in scan_layout.convert(leaves.flatten(saved.trainable), scanned=False).items():
        layer, is_own, name = path.partition(_ADAPTER)
        if is_own:
            found.setdefault(layer, {})[name] = np.asarray(leaf, np.float32)
    return found


def assemble(layers: Layers, shapes: Shapes) -> dict[str, Any]:
    """Returns the tree with these shapes, scanned or not; the inverse of `by_layer`.

    Arrays may have flat features. Vectors of a layer that is missing are ones: the identity.
    """
    tree = {}
    for path, shape in shapes.items():
        axis, is_stack = patching.trees.LAYER_AXIS, patching.trees.stack(path) is not None
        one_shape = (*shape[:axis], *shape[axis + 1 :]) if is_stack else shape
        parts = []
        for one in scan_layout.unscanned_paths(path, shape):
            layer, _, name = one.partition(_ADAPTER)
            part = layers[layer][name] if layer in layers else np.ones(one_shape, np.float32)
            parts.append(np.ascontiguousarray(part).reshape(one_shape))
        tree[path] = np.stack(parts, axis) if is_stack else parts[0]
    return patching.trees.unflatten(tree)


def layers_of(shapes: Shapes) -> list[str]:
    """Returns the adapted layers of the unscanned network."""
    each = (scan_layout.unscanned_paths(path, shape) for path, shape in shapes.items())
    return list(dict.fromkeys(path.partition(_ADAPTER)[0] for paths in each for path in paths))


def check_same(
    saved: saved_run.Saved, again: saved_run.Saved, dtype: str = "float32", rtol: float = 0.0
) -> str:
    """Compares what was read again with what was to be written, of that dtype; returns a line.

    Raises UserError if a leaf is missing, left over or, by more than `rtol`, another.
    """
    want = patching.flatten(leaves.cast_tree(saved.trainable, dtype))
    have = patching.flatten(again.trainable)
    for path in sorted(want.keys() ^ have.keys()):
        what = "lost" if path in want else "added"
        raise errors.UserError(f"{path} was {what} on the way; nothing was kept.")
    same = [path for path in want if np.array_equal(want[path], have[path])]
    for path in sorted(want.keys() - set(same)):
        if not rtol or not np.allclose(want[path], have[path], rtol=rtol, atol=0):
            raise errors.UserError(f"{path} is not what was to be written; nothing was kept.")
    return f"read again: {len(same)} of {len(want)} leaves are the same, bit by bit"


def rule_of(method: methods.Method, layer: str) -> patching.Rule:
    """Returns the rule that adapts a layer of the unscanned network."""
    # A pattern may be of either layout: the method does not say which network it was written for.
    paths = layer, _scanned(layer)
    return next(
        rule for rule in method.rules if any(re.fullmatch(rule.pattern, path) for path in paths)
    )


def path_in(layer: str, network: t5.T5Config) -> str:
    """Returns the path of a layer of the unscanned network in `network`."""
    return _scanned(layer) if network.scan_layers else layer


def _scanned(layer: str) -> str:
    return re.sub(r"^(encoder|decoder)/layers_\d+/", r"\1/\1/", layer)
