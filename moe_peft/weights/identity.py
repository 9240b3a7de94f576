"""What a run is, as json types: written with every checkpoint, compared before one goes on."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from moe_peft import errors, methods

# Parts of the description that must agree with a checkpoint's, and what a person calls them.
_MUST_AGREE = {
    "method": "another method",
    "backbone": "another backbone",
    "model": "another model config",
    "data": "other data",
    "rows": "other data settings",
    "source": "another source run",
}


def describe_model(model: Any) -> dict[str, Any]:
    """Returns the kind and the settings of a network."""
    config = getattr(model, "config", None)
    settings = describe_config(config) if dataclasses.is_dataclass(config) else repr(model)
    return {"class": type(model).__name__, "config": settings}


def describe_config(config: Any) -> dict[str, Any]:
    """Returns the fields of a network's config; later ones at their defaults are left out.

    So what described a network before there were such fields is still its description.
    """
    later = {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("is_later")}
    found = dataclasses.asdict(config).items()
    return {k: value for k, value in found if k not in later or value != later[k]}


def as_json(value: Any) -> Any:
    """Returns `value` as it comes back from a json file, so that both can be compared."""
    return json.loads(json.dumps(value, default=str))


def check_source(method: methods.Method, description: Mapping[str, Any], folder: str) -> None:
    """Raises UserError unless the run described, in `folder`, is what `method` starts from."""
    if method.transfer is None:
        raise errors.UserError(
            f"{method.name!r} does not say what it takes from {folder}: make it with "
            "`@methods.transferred()`, as methods/transferred.gin does."
        )
    current = as_json(method.transfer.source.describe())
    difference = first_difference(description["method"], current)
    if difference:
        raise errors.UserError(
            f"The run in {folder} was trained with another method: {difference}. Give METHOD the "
            "settings of that run, or another run."
        )


def check_same_run(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    model_dir: pathlib.Path | str,
    parts: Sequence[str] = tuple(_MUST_AGREE),
) -> None:
    """Raises UserError, naming the difference, where a checkpoint is of another run.

    Args:
      saved: description in the checkpoint.
      current: description of this run, at least its `parts`.
      model_dir: for the message.
      parts: what must agree: "method", "backbone", "model", "data", "rows", "source". Version 0.1
        did not save "rows"; where they were not saved, they are not compared.
    """
    for part in parts:
        if part == "rows" and part not in saved:
            continue
        difference = first_difference(saved.get(part), current.get(part))
        if difference:
            raise errors.UserError(
                f"The checkpoints in {model_dir} are of a run with {_MUST_AGREE[part]}: "
                f"{difference}. Choose another folder (--out, MODEL_DIR), or go back to the "
                "settings of that run."
            )


def first_difference(
    saved: Any, current: Any, path: str = "", where: tuple[str, str] = ("in the checkpoint", "here")
) -> str:
    """Returns "a.b is 1 in the checkpoint and 2 here", or "" where both are equal."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        pairs = [(key, saved.get(key), current.get(key)) for key in sorted({*saved, *current})]
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        pairs = [(index, *both) for index, both in enumerate(zip(saved, current, strict=True))]
    elif saved == current:
        return ""
    else:
        return f"{path} is {_short(saved)} {where[0]} and {_short(current)} {where[1]}"
    inner = lambda key: f"{path}.{key}" if path else str(key)
    found = (first_difference(old, new, inner(key), where) for key, old, new in pairs)
    return next(filter(None, found), "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
