"""What a checkpoint of T5X must hold for a model with adapters, counted before it is read."""

from collections.abc import Mapping
import math
from typing import Any

from absl import logging
from t5x import state_utils

from moe_peft import errors, patching

_TARGET = "target"
_STATE = "state"


def backbone(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], *, is_resuming: bool = False
) -> Mapping[str, Any]:
    """Lets a checkpoint without adapters be restored into a model with them, whole or not at all.

    For `utils.RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch = True`:
    T5X then fills what a checkpoint lacks with fresh values, without a word about the backbone.
    Here every leaf of the backbone has to be there, in its shape; the count is logged. Adapters are
    there all, or none: then they start fresh (or from the model's file), and of the checkpoint's
    optimiser only the step is kept.

    Args:
      saved: a checkpoint's tree; leaves are arrays or descriptions of them.
      wanted: the model's, leaves with shapes.
      is_resuming: the checkpoint is of this run: nothing may be missing.

    Returns:
      what is to be read.

    Raises:
      UserError: leaves are missing or have other shapes.
    """
    have = state_utils.flatten_state_dict(saved.get(_TARGET, {}))
    want = state_utils.flatten_state_dict(wanted[_TARGET])
    adapters = [path for path in want if patching.is_adapter(path)]
    base = [path for path in want if not patching.is_adapter(path)]
    with_adapters = is_resuming or any(path in have for path in adapters)
    needed = [*base, *adapters] if with_adapters else base
    missing = [path for path in needed if path not in have]
    if missing:
        raise errors.UserError(
            f"The checkpoint lacks {len(missing)} of {len(needed)} leaves, the first is "
            f"{missing[0]}; it has {len(have)}, such as {next(iter(have), 'none')}. Is it of this "
            "network, with layers scanned as here?"
        )
    for path in needed:
        shape = _shape(have[path])
        if shape is not None and shape != tuple(want[path].shape):
            raise errors.UserError(
                f"{path} is {shape} in the checkpoint, {tuple(want[path].shape)} in the model. Is "
                "it of another size?"
            )
    size = lambda paths: sum(math.prod(want[path].shape) for path in paths)
    logging.info(
        "Restoring %d of %d leaves of the backbone (%d parameters); %d leaves of adapters (%d "
        "parameters) %s.",
        len(base),
        len(base),
        size(base),
        len(adapters),
        size(adapters),
        "too" if with_adapters else "start fresh",
    )
    if with_adapters or not adapters:
        return saved
    step = {key: value for key, value in saved.get(_STATE, {}).items() if key == "step"}
    return {_TARGET: saved[_TARGET], _STATE: step}


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """Shape of an array or of a description of one, None where it does not say."""
    if hasattr(leaf, "to_json"):
        leaf = leaf.to_json()
    if isinstance(leaf, Mapping):
        found = leaf.get("metadata", {}).get("shape")
    else:
        found = getattr(leaf, "shape", None)
    return None if found is None else tuple(found)
