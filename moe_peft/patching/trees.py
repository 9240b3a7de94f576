"""Two trees from one and back: what is frozen, and what trains."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util

from moe_peft.patching import paths

Params = Mapping[str, Any]

ADAPTER = "adapter"  # name of the submodule that an adapter is

# Leaves of scanned layers hold all layers of one stack, on this axis.
LAYER_AXIS = 1
stack = paths.scanned_stack


def flatten(params: Params) -> dict[str, Any]:
    """Returns {"encoder/layers_0/attention/query/kernel": leaf, ...}."""
    return flax.traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of `flatten`."""
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


def num_parameters(params: Params) -> int:
    """Returns how many numbers the leaves have together; shapes will do."""
    return sum(leaf.size for leaf in flatten(params).values())


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter or its router.

    >>> is_adapter("encoder/layers_0/mlp/wo/adapter/lora_a"), is_adapter("decoder_norm/scale")
    (True, False)
    """
    return ADAPTER in path.split("/")


def split(params: Params, is_trainable: Callable[[str], bool]) -> tuple[dict, dict]:
    """Returns (frozen, trainable): nested dicts of the leaves by path, each leaf in one of them."""
    frozen, trainable = {}, {}
    for path, leaf in flatten(params).items():
        (trainable if is_trainable(path) else frozen)[path] = leaf
    return unflatten(frozen), unflatten(trainable)


def merge(frozen: Params, trainable: Params) -> dict:
    """Returns the one tree that `split` parted; raises ValueError if a leaf is in both."""
    frozen, trainable = flatten(frozen), flatten(trainable)
    both = sorted(frozen.keys() & trainable.keys())
    if both:
        raise ValueError(f"{len(both)} leaves are frozen and trainable at once, first {both[0]}.")
    return unflatten(frozen | trainable)
