"""`merge`: a run's adapters folded into the network's own weights, as a backbone file."""

import math
import pathlib

from flax import linen as nn
import gin
import jax.numpy as jnp

from moe_peft import errors, merging, methods
from moe_peft.models import encoder_decoder
from moe_peft.training import backbone as backbone_lib
from moe_peft.training import preparation, trained

_SHAPES = {**dict.fromkeys(merging.TOKENS, (1, 2)), "task_ids": (1,)}
# Of the largest logit: rounding of float32, and of activations in bfloat16.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


@gin.register(module="commands")
def merge(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    backbone: str = gin.REQUIRED,
    model_dir: str = gin.REQUIRED,
    path: str = gin.REQUIRED,
    task: int | None = None,
    step: int | None = None,
    dtype: str = "float32",
    frozen_dtype: str = "float32",
    seed: int = 0,
) -> pathlib.Path:
    """Writes the merged weights of a run as safetensors and returns the file's path.

    The file is a backbone, `BACKBONE = "file:PATH"`, for `METHOD = @methods.frozen()` or as the
    start of another adaptation. Before it is written, the logits of both networks are compared on a
    random batch; the largest and the mean difference are printed.

    Args:
      model: the network without adapters.
      method: as trained.
      backbone: as trained.
      model_dir: folder of the run.
      path: the file to write, ending in .safetensors.
      task: id of the task to merge for, where the method tells tasks apart.
      step: which checkpoint; None takes the newest.
      dtype: of the file, "float32" or "bfloat16".
      frozen_dtype: as trained: a run on rounded weights is merged into rounded weights.
      seed: of the batch on which logits are compared.

    Raises:
      UserError: the method cannot be merged, the run or the file is wrong, or the logits differ.
    """
    if not path.endswith(".safetensors"):
        raise errors.UserError(f"The merged file is called {path!r}; expected *.safetensors.")
    backbone_lib.check_dtype(dtype)
    if not method.rules:
        raise errors.UserError(f"The method {method.name!r} has no adapters to merge.")
    merging.check(method, task)
    start = preparation.Start(
        encoder_decoder.EncoderDecoder(method.patch(model), method=method),
        encoder_decoder.EncoderDecoder(model),
        method,
        _SHAPES,
    )
    params, step = trained.load(start, backbone, model_dir, step, frozen_dtype)
    merged = merging.merge_into_base(model, method, params, task)
    gap = merging.logit_gap(model, method, params, merged, task, seed)
    print(
        f"logits before and after on a random batch: largest difference {gap.largest:.2g}, mean "
        f"{gap.mean:.2g}, largest logit {gap.scale:.3g}"
    )
    allowed = _ALLOWED[jnp.dtype(model.config.dtype).name]
    if not gap.relative < allowed or not math.isfinite(gap.relative):
        raise errors.UserError(
            f"Merged logits differ by {gap.relative:.2g} of the largest logit, more than "
            f"{allowed:g}; nothing was written. Are the run's weights finite?"
        )
    metadata = {
        "merged": preparation.as_json(method.describe()),
        "task": task,
        "step": step,
        "model_dir": str(model_dir),
        "backbone_spec": backbone,
    }
    return backbone_lib.save(merged, path, dtype, metadata)
