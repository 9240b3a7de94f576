"""`export`: what a run has trained, as one file or as an adapter folder."""

import dataclasses
import pathlib

from moe_peft import errors
from moe_peft.config import settings as settings_lib
from moe_peft.convert import adapter_folder
from moe_peft.weights import saved_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `export`."""

    model_dir: str  # folder of the run or of the adaptation
    path: str  # what to write: one file where it ends in .safetensors, else an adapter folder
    step: int | None = None  # which checkpoint; None takes the newest
    dtype: str = "float32"  # or "bfloat16"
    member: str | None = None  # which run of an adaptation, "TASK:SEED"
    license: str | None = None  # in the folder's model card, such as "apache-2.0"
    overwrite: bool = False  # replace an adapter folder; a file is always replaced


@settings_lib.entry_point(Settings, "export", module="commands")
def export(settings: Settings) -> pathlib.Path:
    """Writes the trained parameters of a run and returns the path of the file or folder.

    A file holds names such as "encoder/layers_0/attention/key/adapter/vectors", and what the run
    was (method, backbone's fingerprint, model, data) as metadata. A run of the method `full` gives
    a backbone: `BACKBONE = "file:PATH"`. An adapter folder holds such a file, a model card with the
    scores of `moe-peft eval`, and the same for PEFT where PEFT can express the method. A checkpoint
    that does not exist, or something that cannot be written, raises UserError.
    """
    is_file = settings.path.endswith(".safetensors")
    if is_file and settings.license is not None:
        raise errors.UserError(
            f"A license is for the model card of an adapter folder, and {settings.path} is a file."
        )
    saved = saved_run.load(settings.model_dir, settings.step, settings.member)
    if is_file:
        return saved_run.save(saved, settings.path, settings.dtype)
    return adapter_folder.write(
        saved,
        settings.path,
        run_folder=pathlib.Path(settings.model_dir).expanduser(),
        license=settings.license,
        overwrite=settings.overwrite,
        dtype=settings.dtype,
    )
