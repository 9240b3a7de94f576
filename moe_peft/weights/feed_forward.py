"""What transformers' config.json says of a feed-forward block, and our activations, both ways."""

from collections.abc import Mapping
from typing import Any

from moe_peft import errors

_PROJECTION, _FUNCTION, _IS_GATED = "feed_forward_proj", "dense_act_fn", "is_gated_act"

# Functions by their names there.
_FUNCTIONS = {"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu", "silu": "silu"}
# Blocks. The gate of "gated-gelu" is the one that does not mean the function of that name.
_PROJECTIONS = {name: (function,) for name, function in _FUNCTIONS.items()}
_PROJECTIONS |= {"gated-gelu": ("gelu", "linear"), "gated-relu": ("relu", "linear")}
_PROJECTIONS |= {"gated-silu": ("silu", "linear")}


def activations(settings: Mapping[str, Any], where: Any) -> tuple[str, ...]:
    """Returns T5Config's `mlp_activations`.

    Raises UserError, naming the file `where`, for functions that the network does not have.
    """
    default = "relu" if settings.get("model_type", "t5") == "t5" else "gated-gelu"
    projection = settings.get(_PROJECTION, default)
    errors.check_one_of(f"{where}: {_PROJECTION}", projection, _PROJECTIONS)
    function, *gate = _PROJECTIONS[projection]
    # What transformers makes of the name is often stored next to it, and then it counts.
    if settings.get(_FUNCTION) is not None:
        errors.check_one_of(f"{where}: {_FUNCTION}", settings[_FUNCTION], _FUNCTIONS)
        function = _FUNCTIONS[settings[_FUNCTION]]
    return (function, "linear") if settings.get(_IS_GATED, bool(gate)) else (function,)


def said(mlp_activations: tuple[str, ...], old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of config.json; as it was in an old one where that means the same.

    Raises UserError if transformers has no such block.
    """
    keys = [key for key in (_PROJECTION, _FUNCTION, _IS_GATED) if key in old]
    if keys and activations(old, "config.json") == mlp_activations:
        return {key: old[key] for key in keys}
    names = {block: name for name, block in _PROJECTIONS.items()}
    if mlp_activations not in names:
        raise errors.UserError(f"transformers' T5 has no feed-forward block of {mlp_activations}.")
    functions = {function: name for name, function in _FUNCTIONS.items()}
    now = {_FUNCTION: functions[mlp_activations[0]], _IS_GATED: len(mlp_activations) == 2}
    now[_PROJECTION] = names[mlp_activations]
    return {key: now[key] for key in (_PROJECTION, *keys)}
