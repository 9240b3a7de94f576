"""Parameters of a finished or running training run, for evaluation, inference and export."""

import pathlib

import jax.numpy as jnp
from jaxtyping import PyTree

from moe_peft import errors, patching
from moe_peft.training import start as start_lib
from moe_peft.weights import exported, identity, saved_run


def load(
    start: start_lib.Start,
    backbone: str,
    model_dir: str | pathlib.Path | None,
    step: int | None = None,
    frozen_dtype: str = "float32",
    start_from: str | None = None,
    member: str | None = None,
) -> tuple[PyTree, int]:
    """Returns (params, step) of a run: its backbone and what it has trained, merged.

    Args:
      start: models, method and batch shapes (any batch shapes will do).
      backbone: the spec the run was trained with, or another name of the same weights.
      model_dir: folder of the run, or the file it was exported to; None gives the backbone with
        fresh adapters and step 0.
      step: which checkpoint; None takes the newest.
      frozen_dtype: how frozen leaves are stored.
      start_from: folder of a run that a transferred method starts from: its parameters, transferred
        and not trained further, instead of those of `model_dir`. A method that is not transferred
        takes them as they are, from a run of its own or from its exported file.
      member: which run of an adaptation `model_dir` means, "TASK:SEED".

    Raises:
      UserError: no such checkpoint, or the run had another method, backbone or model config.
    """
    if start_from is not None and start.method.transfer is None:
        model_dir, start_from = start_from, None
    if start_from is not None:
        source = start_lib.Source.load(start.method, start_from)
        trees = start.trees(backbone, 0, frozen_dtype, source)
        source.check_backbone(trees.fingerprint)
        return patching.merge(trees.frozen, trees.trainable), 0
    if model_dir is None:
        trees = start.trees(backbone, seed=0, frozen_dtype=frozen_dtype)
        return patching.merge(trees.frozen, trees.trainable), 0
    saved = exported.load(model_dir, step, member)
    return of_saved(start, backbone, saved, str(model_dir), frozen_dtype), saved.step


def of_saved(
    start: start_lib.Start,
    backbone: str,
    saved: saved_run.Saved,
    where: str,
    frozen_dtype: str = "float32",
) -> PyTree:
    """Returns the backbone and what `saved` holds, merged.

    Args:
      start: see `load`.
      backbone: likewise.
      saved: what was trained.
      where: it is from, for messages.
      frozen_dtype: see `load`.

    Raises:
      UserError: it is of another method, backbone or model config.
    """
    source, transfer = None, start.method.transfer
    if transfer is not None and transfer.variant == "z":  # Its modules were not trained.
        origin = saved.description["source"]
        source = start_lib.Source.load(start.method, origin["folder"], origin["step"])
    trees = start.trees(backbone, 0, frozen_dtype, source)
    current = {
        "method": identity.as_json(start.method.describe()),
        "backbone": {**saved.description["backbone"], "fingerprint": trees.fingerprint},
    }
    identity.check_same_run(saved.description, current, where, ("method", "backbone"))
    want = {path: leaf.shape for path, leaf in patching.flatten(trees.trainable).items()}
    have = {path: leaf.shape for path, leaf in patching.flatten(saved.trainable).items()}
    if want != have:
        differing = sorted(
            path for path in want.keys() | have.keys() if want.get(path) != have.get(path)
        )
        raise errors.UserError(
            f"The checkpoint of step {saved.step} in {where} does not fit the model: "
            f"{len(differing)} leaves differ, the first is {differing[0]}."
        )
    trained = {path: jnp.asarray(leaf) for path, leaf in patching.flatten(saved.trainable).items()}
    return patching.merge(trees.frozen, patching.trees.unflatten(trained))
