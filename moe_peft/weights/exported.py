"""What was trained, wherever it lies: a run's checkpoints, one run of an adaptation, a file."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax
import safetensors

from moe_peft import errors
from moe_peft.weights import backbone, saved_run

_GROUPS = "groups"
_MAX_NAMED = 5


def load(
    source: pathlib.Path | str, step: int | None = None, member: str | None = None
) -> saved_run.Saved:
    """Returns the trained leaves and the description of what trained them.

    Args:
      source: folder of a run or of an adaptation, or a file as `moe-peft export` writes it.
      step: which checkpoint of a run; None takes the newest.
      member: which run of an adaptation, "TASK:SEED".

    Raises:
      UserError: there is no such thing, it is damaged, or a file has no record of a method.
    """
    path = pathlib.Path(source).expanduser()
    if is_adaptation(path):
        return _load_member(path, member)
    if member is not None:
        raise errors.UserError(f"{source} is no adaptation, so it has no run {member!r}.")
    if not path.is_file():
        return saved_run.load_trainable(source, step)
    description = dict(read_description(path))
    saved_step = description.pop("step", 0)
    if step not in (None, saved_step):
        raise errors.UserError(f"{path} holds step {saved_step}, not step {step}.")
    tree = backbone.read(path)
    return saved_run.Saved(saved_step, tree, {}, {"description": description})


def is_adaptation(path: pathlib.Path) -> bool:
    """Whether `moe-peft adapt` made the folder."""
    return (path / _GROUPS / "plan.json").is_file()


def holds_adapter(path: pathlib.Path) -> bool:
    """Whether a file was exported from a run that trained an adapter, not the whole model."""
    return _metadata(path).get("method", {}).get("name") not in (None, "full")


def read_description(path: pathlib.Path) -> Mapping[str, Any]:
    """Returns what a file says of the run that it was exported from.

    Raises:
      UserError: the file cannot be read, or says nothing.
    """
    found = _metadata(path)
    if "name" not in found.get("method", {}):
        raise errors.UserError(
            f"{path} has no 'method' in its header's 'moe_peft', so it is no exported adapter."
        )
    return found


def save(
    saved: saved_run.Saved, path: pathlib.Path | str, dtype: str | None = "float32"
) -> pathlib.Path:
    """Writes what `load` reads; see `backbone.save`. docs/interop.md has the schema."""
    metadata = {**saved.description, "step": saved.step}
    return backbone.save(saved.trainable, path, dtype, metadata)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    try:
        return backbone.read_metadata(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise errors.UserError(f"{path} cannot be read as safetensors: {error}.") from error


def _load_member(folder: pathlib.Path, member: str | None) -> saved_run.Saved:
    plan = json.loads((folder / _GROUPS / "plan.json").read_text(encoding="utf-8"))
    places = {
        f"{job['task']}:{job['seed']}": (folder / _GROUPS / f"{number:03}", place)
        for number, jobs in enumerate(plan["groups"])
        for place, job in enumerate(jobs)
    }
    if member not in places:
        came = f"which has no {member!r}" if member else "of which one has to be named"
        raise errors.UserError(
            f"{folder} is an adaptation of {len(places)} runs TASK:SEED, {came}. There is "
            f"{', '.join(list(places)[:_MAX_NAMED])}, ...{errors.near(str(member), places)}"
        )
    group, place = places[member]
    if not (group / "finished.json").is_file():
        raise errors.UserError(f"The run {member!r} in {folder} is not finished.")
    run = json.loads((group / "finished.json").read_text(encoding="utf-8"))["runs"][place]
    tree = jax.tree.map(lambda leaf: leaf[place], backbone.read(group / "adapters.safetensors"))
    description = {**plan["description"], "member": member}
    return saved_run.Saved(run["chosen_step"], tree, {}, {"description": description})
