"""Checkpoints on disk, as any reader sees them: which there are, and what one holds."""

from collections.abc import Mapping
import dataclasses
import errno
import os
import pathlib
from typing import Any

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from moe_peft import errors
from moe_peft.runtime import digest

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint as read from disk.

    Attributes:
      step: updates made.
      trainable: nested dict of NumPy arrays.
      position: {"opt_state": {"0000": leaf, ...}, "rng": raw key}; empty if it was not asked for.
      record: the json part; `record["description"]` says what the run is.
    """

    step: int
    trainable: PyTree
    position: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def description(self) -> Mapping[str, Any]:
        """What the run is: method, backbone, model, data, optimiser."""
        return self.record["description"]


def reason(error: BaseException) -> str:
    """The system's words for a full disk or a refused write, else the error's first line."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        words = errno.errorcode[code]
        described = os.strerror(code)
        if getattr(error, "errno", None) == code or described in text or words in text:
            return described
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"


def steps(model_dir: pathlib.Path | str) -> list[int]:
    """Returns the steps of all checkpoints of a run, oldest first, damaged ones included."""
    folder = pathlib.Path(model_dir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def load_trainable(model_dir: pathlib.Path | str, step: int | None = None) -> Saved:
    """Returns the trained leaves of a run, for evaluation, export or as a backbone.

    Args:
      model_dir: folder of the run.
      step: which checkpoint; None takes the newest.

    Raises:
      UserError: no such run, no such step, or the checkpoint is damaged.
    """
    found = steps(model_dir)
    if not found:
        raise errors.UserError(f"There is no training checkpoint in {model_dir}.")
    if step is not None and step not in found:
        raise errors.UserError(
            f"{model_dir} has no checkpoint of step {step}; it has steps "
            f"{', '.join(str(other) for other in found)}."
        )
    chosen = found[-1] if step is None else step
    try:
        return read(pathlib.Path(model_dir), chosen, ("trainable",))
    except Exception as error:
        raise errors.UserError(
            f"The checkpoint of step {chosen} in {model_dir} is damaged ({reason(error)}). "
            f"Checkpoints there: steps {', '.join(str(other) for other in found)}."
        ) from error


def read(model_dir: pathlib.Path, step: int, items: tuple[str, ...]) -> Saved:
    """Reads one checkpoint; raises any exception if it is incomplete or its digests differ."""
    # Every process reads for itself; orbax's default is to wait for all of them in between.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
    wanted = {name: ocp.args.StandardRestore() for name in items}
    with reader:
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
    return Saved(step, found["trainable"], found.get("position") or {}, record)
