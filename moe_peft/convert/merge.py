"""`merge`: a run's adapters folded into the network's own weights, as a backbone file."""

import pathlib

from flax import linen as nn
import gin

from moe_peft import errors, methods
from moe_peft.convert import merged as merged_lib
from moe_peft.weights import backbone as backbone_lib
from moe_peft.weights import exported, identity


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
    member: str | None = None,
) -> pathlib.Path:
    """Writes the merged weights of a run as safetensors and returns the file's path.

    The file is a backbone, `BACKBONE = "file:PATH"`, for `METHOD = @methods.frozen()` or as the
    start of another adaptation; `moe-peft convert` writes it, or the run itself, for Hugging Face
    and T5X. Before it is written, the logits of both networks are compared on a
    random batch; the largest and the mean difference are printed.

    Args:
      model: the network without adapters.
      method: as trained.
      backbone: as trained.
      model_dir: folder of the run or of the adaptation, or an exported file.
      path: the file to write, ending in .safetensors.
      task: id of the task to merge for, where the method tells tasks apart.
      step: which checkpoint; None takes the newest.
      dtype: of the file, "float32" or "bfloat16".
      frozen_dtype: as trained: a run on rounded weights is merged into rounded weights.
      seed: of the batch on which logits are compared.
      member: which run of an adaptation, "TASK:SEED"; needed where `model_dir` is one.

    Raises:
      UserError: the method cannot be merged, the run or the file is wrong, or the logits differ.
    """
    if not path.endswith(".safetensors"):
        raise errors.UserError(f"The merged file is called {path!r}; expected *.safetensors.")
    backbone_lib.check_dtype(dtype)
    merged_lib.check(method, task)
    saved = exported.load(model_dir, step, member)
    merged = merged_lib.merge(
        model,
        method,
        backbone,
        saved,
        str(model_dir),
        task=task,
        frozen_dtype=frozen_dtype,
        seed=seed,
    )
    print(f"logits before and after on a random batch: {merged.gap}")
    metadata = {**merged.record, "model": identity.describe_model(model)}
    return backbone_lib.save(merged.params, path, dtype, identity.as_json(metadata))
