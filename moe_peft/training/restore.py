"""The model of a finished or running training run, for evaluation, inference and merging."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import layout as layout_lib
from moe_peft.training import start as start_lib
from moe_peft.weights import identity, saved_run


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model ready to be asked."""

    model: encoder_decoder.EncoderDecoder  # patched
    params: PyTree  # on the devices of the mesh, split by `partitioning.Layout`
    run: Mapping[str, Any]  # what a report says about it, as JSON types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which run is asked."""

    model: nn.Module  # the network without adapters
    method: methods.Method  # as trained; `frozen` asks the backbone and needs no checkpoint
    backbone: str  # as trained, such as "embedded:cldr_tiny"
    model_dir: str  # folder of the run; an evaluation of `frozen` writes its results there too
    step: int | None = None  # which checkpoint; None for the newest
    frozen_dtype: str = "float32"  # or "bfloat16" for half the memory
    mesh: jax.sharding.Mesh | None = None  # devices; default: all, data-parallel


def model(
    settings: Settings,
    batch_shapes: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    start_from: str | None = None,
) -> Restored:
    """Returns the model that a run left in its folder, on the devices of the mesh.

    Raises UserError: the checkpoint is missing or damaged, or is of another method, backbone or
    model.
    """
    method, backbone, folder = settings.method, settings.backbone, settings.model_dir
    start = start_lib.Start.of_network(settings.model, method, batch_shapes)
    shapes = start.shapes()
    frozen, trainable = map(patching.trees.num_parameters, method.split(shapes))
    own = patching.trees.num_parameters(start.base_shapes())
    how = (settings.step, settings.frozen_dtype, start_from)
    found, step = params(start, backbone, folder if trainable else None, *how)
    run = {
        "method": identity.as_json(method.describe()),
        "backbone": backbone,
        "model_dir": str(folder),
        "step": step,
        "trainable_parameters": trainable,
        "total_parameters": trainable + frozen,
        "network_parameters": own,
    }
    shardings = layout_lib.Layout(mesh).shardings(found, start.logical_axes())
    return Restored(start.model, jax.device_put(found, shardings), run)


def params(
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
      model_dir: folder of the run, or the file it was exported to; None: fresh adapters, step 0.
      step: which checkpoint; None takes the newest.
      frozen_dtype: how frozen leaves are stored, "float32" or "bfloat16".
      start_from: folder of a run that a transferred method starts from: its parameters, transferred
        and not trained further, instead of those of `model_dir`. A method that is not transferred
        takes them as they are, from a run of its own or from its exported file.
      member: which run of an adaptation `model_dir` means, "TASK:SEED".

    Raises UserError: no such checkpoint, or the run had another method, backbone or model config.
    """
    if start_from is not None and start.method.transfer is None:
        model_dir, start_from = start_from, None
    if start_from is None and model_dir is not None:
        saved = saved_run.load(model_dir, step, member)
        return params_of(start, backbone, saved, str(model_dir), frozen_dtype), saved.step
    source = start_lib.Source.load(start.method, start_from) if start_from is not None else None
    trees = start.trees(backbone, 0, frozen_dtype, source)
    if source is not None:
        source.check_backbone(trees.fingerprint)
    return patching.merge(trees.frozen, trees.trainable), 0


def params_of(
    start: start_lib.Start, backbone: str, saved: saved_run.Saved, where: str, frozen_dtype: str
) -> PyTree:
    """Returns the backbone and what `saved` holds, merged; `where` it is from is for messages.

    Raises UserError: it is of another method, backbone or model config.
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
    have, want = (patching.flatten(tree) for tree in (saved.trainable, trees.trainable))
    shapes = ({path: leaf.shape for path, leaf in tree.items()} for tree in (have, want))
    difference = identity.first_difference(*shapes)
    if difference:
        raise errors.UserError(
            f"The checkpoint of step {saved.step} in {where} does not fit the model: {difference}."
        )
    trained = patching.trees.unflatten({path: jnp.asarray(leaf) for path, leaf in have.items()})
    return patching.merge(trees.frozen, trained)
