"""`export`: what a run has trained, as one file."""

import dataclasses
import pathlib

from moe_peft import errors
from moe_peft.config import settings as settings_lib
from moe_peft.weights import saved_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `export`."""

    model_dir: str  # folder of the run or of the adaptation
    path: str  # the file to write, ending in .safetensors
    step: int | None = None  # which checkpoint; None takes the newest
    dtype: str = "float32"  # or "bfloat16"
    member: str | None = None  # which run of an adaptation, "TASK:SEED"


@settings_lib.entry_point(Settings, "export", module="commands")
def export(settings: Settings) -> pathlib.Path:
    """Writes the trained parameters of a run as safetensors and returns the file's path.

    The file holds names such as "encoder/layers_0/attention/key/adapter/vectors", and what the run
    was (method, backbone's fingerprint, model, data) as metadata. A run of the method `full` gives
    a backbone: `BACKBONE = "file:PATH"`. A checkpoint that does not exist, or a file that cannot be
    written, raises UserError.
    """
    if not settings.path.endswith(".safetensors"):
        raise errors.UserError(
            f"The exported file is called {settings.path!r}; expected *.safetensors."
        )
    saved = saved_run.load(settings.model_dir, settings.step, settings.member)
    return saved_run.save(saved, settings.path, settings.dtype)
