"""Parameters of a finished or running training run, for evaluation, inference and export."""

import pathlib

import jax.numpy as jnp
from jaxtyping import PyTree

from moe_peft import errors, patching
from moe_peft.training import checkpoints, preparation


def load(
    start: preparation.Start,
    backbone: str,
    model_dir: str | pathlib.Path | None,
    step: int | None = None,
    frozen_dtype: str = "float32",
    start_from: str | None = None,
) -> tuple[PyTree, int]:
    """Returns (params, step) of a run: its backbone and what it has trained, merged.

    Args:
      start: models, method and batch shapes (any batch shapes will do).
      backbone: the spec the run was trained with, or another name of the same weights.
      model_dir: folder of the run; None gives the backbone with fresh adapters and step 0.
      step: which checkpoint; None takes the newest.
      frozen_dtype: how frozen leaves are stored.
      start_from: folder of a run that a transferred method starts from: its parameters, transferred
        and not trained further, instead of those of `model_dir`.

    Raises:
      UserError: no such checkpoint, or the run had another method, backbone or model config.
    """
    if start_from is not None:
        source = preparation.Source.load(start.method, start_from)
        trees = start.trees(backbone, 0, frozen_dtype, source)
        source.check_backbone(trees.fingerprint)
        return patching.merge(trees.frozen, trees.trainable), 0
    if model_dir is None:
        trees = start.trees(backbone, seed=0, frozen_dtype=frozen_dtype)
        return patching.merge(trees.frozen, trees.trainable), 0
    saved = checkpoints.load_trainable(model_dir, step)
    trees = start.trees(backbone, seed=0, frozen_dtype=frozen_dtype)
    current = {
        "method": preparation.as_json(start.method.describe()),
        "backbone": {**saved.description["backbone"], "fingerprint": trees.fingerprint},
    }
    preparation.check_same_run(saved.description, current, model_dir, ("method", "backbone"))
    want = {path: leaf.shape for path, leaf in patching.flatten(trees.trainable).items()}
    have = {path: leaf.shape for path, leaf in patching.flatten(saved.trainable).items()}
    if want != have:
        differing = sorted(
            path for path in want.keys() | have.keys() if want.get(path) != have.get(path)
        )
        raise errors.UserError(
            f"The checkpoint of step {saved.step} in {model_dir} does not fit the model: "
            f"{len(differing)} leaves differ, the first is {differing[0]}."
        )
    trained = {path: jnp.asarray(leaf) for path, leaf in patching.flatten(saved.trainable).items()}
    return patching.merge(trees.frozen, patching.trees.unflatten(trained)), saved.step
