"""What was trained, wherever it lies: a run, one of an adaptation, a file, an adapter folder."""

from collections.abc import Mapping
import dataclasses
import errno
import json
import os
import pathlib
from typing import Any

from etils import epath
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from moe_peft import errors
from moe_peft.runtime import digest
from moe_peft.weights import locations, safetensors_files

FOLDER = "checkpoints"
ADAPTER = "adapter.safetensors"  # in an adapter folder
_GROUPS = "groups"
_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Saved:
    """What one run has trained, as read from disk."""

    step: int  # updates made
    trainable: PyTree  # nested dict of NumPy arrays
    # {"opt_state": {"0000": leaf, ...}, "rng": raw key}; empty if it was not asked for
    position: Mapping[str, Any]
    record: Mapping[str, Any]  # the JSON part; `record["description"]` says what the run is

    @property
    def description(self) -> Mapping[str, Any]:
        """What the run is: method, backbone, model, data, optimiser."""
        return self.record["description"]


def load(source: pathlib.Path | str, step: int | None = None, member: str | None = None) -> Saved:
    """Returns what was trained, and the description of the run that trained it.

    `source` is the folder of a run, of which step None takes the newest checkpoint; or of an
    adaptation, of which `member` names the run "TASK:SEED"; or a file or an adapter folder that
    `moe-peft export` wrote. Raises UserError if that is not there, is damaged, or has no record of
    a method.
    """
    path = pathlib.Path(source).expanduser()
    if is_adaptation(path):
        return _load_member(path, member)
    if member is not None:
        raise errors.UserError(f"{source} is not an adaptation, so it has no run {member!r}.")
    file = path / ADAPTER if is_adapter_folder(path) else path
    return _load_file(file, step) if file.is_file() else _load_checkpoint(path, step)


def description_of(source: pathlib.Path | str) -> Mapping[str, Any]:
    """What `load` says the run of a folder or file is, without reading what was trained."""
    path = pathlib.Path(source).expanduser()
    file = path / ADAPTER if is_adapter_folder(path) else path
    if file.is_file():
        return _description_in(file)
    found = steps(path)
    return read(path, found[-1], ()).description if found else load(path).description


def steps(model_dir: epath.PathLike) -> list[int]:
    """Returns the steps of all checkpoints of a run, oldest first, damaged ones included."""
    folder = pathlib.Path(model_dir) / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def read(model_dir: pathlib.Path, step: int, items: tuple[str, ...]) -> Saved:
    """Reads "trainable", "position" or both of one checkpoint; any exception if it is damaged."""
    # Every process reads for itself; orbax's default is to wait for all of them in between.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    wanted = {name: ocp.args.StandardRestore() for name in items}
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        found = reader.restore(
            (model_dir / FOLDER / str(step)).absolute(),
            ocp.args.Composite(record=ocp.args.JsonRestore(), **wanted),
        )
    record = found["record"]
    for name in items:
        if digest.of_tree(found[name]) != record["digests"][name]:
            raise ValueError(f"the values of {name} are not those that were saved")
    if record["step"] != step:
        raise ValueError(f"it is of step {record['step']}")
    trainable = found["trainable"] if "trainable" in items else {}
    return Saved(step, trainable, found.get("position") or {}, record)


def reason(error: BaseException) -> str:
    """The system's words for a full disk or a refused write, else the error's first line."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        described, name = os.strerror(code), errno.errorcode[code]
        if getattr(error, "errno", None) == code or described in text or name in text:
            return described
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"


def save(saved: Saved, path: pathlib.Path | str, dtype: str | None = "float32") -> pathlib.Path:
    """Writes a file that `load` reads, of that dtype; docs/interop.md has the schema."""
    metadata = {**saved.description, "step": saved.step}
    return safetensors_files.save_tree(saved.trainable, path, dtype, metadata)


def is_adaptation(path: pathlib.Path) -> bool:
    """Whether `moe-peft adapt` made the folder."""
    return (path / _GROUPS / "plan.json").is_file()


def is_adapter_folder(path: epath.Path | pathlib.Path) -> bool:
    """Whether the folder holds an adapter in our own format, and is not that of a run."""
    return (path / ADAPTER).is_file() and not steps(path)


def is_adapter_file(path: pathlib.Path) -> bool:
    """Whether a file was exported from a run that trained an adapter, not the whole model."""
    method = safetensors_files.read_metadata(path).get("method", {})
    return method.get("name") not in (None, "full")


def _load_checkpoint(folder: pathlib.Path, step: int | None) -> Saved:
    found = steps(folder)
    if not found:
        hint = locations.hint_at(folder)
        raise errors.UserError(f"There is no training checkpoint in {folder}.{hint}")
    known = ", ".join(map(str, found))
    if step is not None and step not in found:
        raise errors.UserError(f"{folder} has no checkpoint of step {step}; it has steps {known}.")
    chosen = found[-1] if step is None else step
    try:
        return read(folder, chosen, ("trainable",))
    except Exception as error:
        damage = f"is damaged ({reason(error)}). Checkpoints there: steps {known}."
        raise errors.UserError(f"The checkpoint of step {chosen} in {folder} {damage}") from error


def _load_file(path: pathlib.Path, step: int | None) -> Saved:
    description = _description_in(path)
    saved_step = description.pop("step", 0)
    if step not in (None, saved_step):
        raise errors.UserError(f"{path} holds step {saved_step}, not step {step}.")
    tree = safetensors_files.read_tree(path)
    return Saved(saved_step, tree, {}, {"description": description})


def _description_in(path: pathlib.Path) -> dict[str, Any]:
    description = safetensors_files.read_metadata(path)
    if "name" not in description.get("method", {}):
        lacks = "no 'method' in its header's 'moe_peft', so it is not an exported adapter"
        raise errors.UserError(f"{path} has {lacks}.")
    return description


def _load_member(folder: pathlib.Path, member: str | None) -> Saved:
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
    tree = safetensors_files.read_tree(group / "adapters.safetensors")
    tree = jax.tree.map(lambda leaf: leaf[place], tree)  # runs of a group are stacked
    description = {**plan["description"], "member": member}
    return Saved(run["chosen_step"], tree, {}, {"description": description})
