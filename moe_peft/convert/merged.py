"""A run's adapters folded into its weights, checked on logits before anything is written."""

import dataclasses
import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import PyTree

from moe_peft import errors, methods
from moe_peft.models import encoder_decoder
from moe_peft.training import restore
from moe_peft.training import start as start_lib
from moe_peft.weights import identity, merging, saved_run

_SHAPES = {**dict.fromkeys(merging.TOKENS, (1, 2)), "task_ids": (1,)}
# Of the largest logit: rounding of float32, and of activations in bfloat16.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Merged:
    """Weights without adapters.

    Attributes:
      params: nested, float32.
      gap: between logits before and after.
      record: what was merged, as JSON types.
    """

    params: PyTree
    gap: merging.Gap
    record: dict


def check(method: methods.Method, task: int | None) -> None:
    """Raises UserError unless the method can be merged for that task."""
    if not method.rules:
        raise errors.UserError(f"The method {method.name!r} has no adapters to merge.")
    merging.check(method, task)


def merge(
    network: nn.Module,
    method: methods.Method,
    backbone: str,
    saved: saved_run.Saved,
    where: str,
    *,
    task: int | None = None,
    frozen_dtype: str = "float32",
    seed: int = 0,
) -> Merged:
    """Merges, and compares logits on a random batch.

    Args:
      network: without adapters.
      method: as trained.
      backbone: as trained.
      saved: what was trained.
      where: it is from, for messages.
      task: id of the task to merge for, where the method tells tasks apart.
      frozen_dtype: as trained: a run on rounded weights is merged into rounded weights.
      seed: of the batch.

    Raises:
      UserError: the method cannot be merged, the run does not fit, or the logits differ.
    """
    check(method, task)
    start = start_lib.Start(
        encoder_decoder.EncoderDecoder(method.patch(network), method=method),
        encoder_decoder.EncoderDecoder(network),
        method,
        _SHAPES,
    )
    params = restore.of_saved(start, backbone, saved, where, frozen_dtype)
    merged = merging.merge_into_base(network, method, params, task)
    gap = merging.logit_gap(network, method, params, merged, task, seed)
    allowed = _ALLOWED[jnp.dtype(network.config.dtype).name]
    if not gap.relative < allowed or not math.isfinite(gap.relative):
        raise errors.UserError(
            f"Merged logits differ by {gap.relative:.2g} of the largest logit, more than "
            f"{allowed:g}; nothing was written. Are the run's weights finite?"
        )
    record = {
        "merged": identity.as_json(method.describe()),
        "task": task,
        "step": saved.step,
        "model_dir": where,
        "backbone_spec": backbone,
    }
    return Merged(merged, gap, record)
