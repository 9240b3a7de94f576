"""`export`: what a run has trained, as one file."""

import pathlib

import gin

from moe_peft import errors
from moe_peft.weights import saved_run


@gin.register(module="commands")
def export(
    model_dir: str = gin.REQUIRED,
    path: str = gin.REQUIRED,
    step: int | None = None,
    dtype: str = "float32",
    member: str | None = None,
) -> pathlib.Path:
    """Writes the trained parameters of a run as safetensors and returns the file's path.

    The file holds names such as "encoder/layers_0/attention/key/adapter/vectors", and what the run
    was (method, backbone's fingerprint, model, data) as metadata. A run of the method `full` gives
    a backbone: `BACKBONE = "file:PATH"`.

    Args:
      model_dir: folder of the run or of the adaptation.
      path: the file to write, ending in .safetensors.
      step: which checkpoint; None takes the newest.
      dtype: "float32" or "bfloat16".
      member: which run of an adaptation, "TASK:SEED"; needed where `model_dir` is one.

    Raises:
      UserError: there is no such checkpoint, or the file cannot be written.
    """
    if not path.endswith(".safetensors"):
        raise errors.UserError(f"The exported file is called {path!r}; expected *.safetensors.")
    return saved_run.save(saved_run.load(model_dir, step, member), path, dtype)
