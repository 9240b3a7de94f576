"""The model of a finished run on the devices that will be asked."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jaxtyping import PyTree

from moe_peft import methods
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import layout as layout_lib
from moe_peft.training import restore as restore_lib
from moe_peft.training import start as start_lib
from moe_peft.weights import identity


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model ready to be asked.

    Attributes:
      model: patched.
      params: on the devices of the mesh, split by `partitioning.Layout`.
      run: what a report says about it, as JSON types.
    """

    model: encoder_decoder.EncoderDecoder
    params: PyTree
    run: Mapping[str, Any]


def restore(
    module: nn.Module,
    method: methods.Method,
    backbone: str,
    model_dir: str,
    batch_shapes: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    frozen_dtype: str = "float32",
    start_from: str | None = None,
) -> Restored:
    """Returns the model that a run of `method` left in `model_dir`.

    Args:
      module: the network without adapters.
      method: as trained; one that trains nothing needs no checkpoint.
      backbone: as trained; see `training.backbone.load`.
      model_dir: folder of the run.
      batch_shapes: feature name to shape, as the model will see them.
      mesh: devices.
      step: which checkpoint; None for the newest.
      frozen_dtype: "float32" or "bfloat16", how frozen weights are stored.
      start_from: see `trained.load`.

    Raises:
      UserError: the checkpoint is missing or damaged, or is of another method, backbone or model.
    """
    base = encoder_decoder.EncoderDecoder(module)
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    start = start_lib.Start(model, base, method, batch_shapes)
    shapes = jax.eval_shape(lambda rng: model.init(rng, batch_shapes), jax.random.key(0))
    frozen, trainable = map(_count, method.split(shapes))
    params, step = restore_lib.load(
        start, backbone, model_dir if trainable else None, step, frozen_dtype, start_from
    )
    run = {
        "method": identity.as_json(method.describe()),
        "backbone": backbone,
        "model_dir": str(model_dir),
        "step": step,
        "trainable_parameters": trainable,
        "total_parameters": trainable + frozen,
    }
    shardings = layout_lib.Layout(mesh).shardings(params, start.logical_axes())
    return Restored(model, jax.device_put(params, shardings), run)


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
