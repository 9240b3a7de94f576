"""Where the official files of the benchmarks lie on this machine."""

import os
import pathlib

import gin

from moe_peft import errors

VARIABLE = "MOE_PEFT_DATA"
SAMPLES = "embedded:samples"

# What each folder under the root holds.
LAYOUT = {
    "superni": "a checkout of allenai/natural-instructions: tasks/, splits/",
    "crossfit": "CrossFit's data/: one folder per task with its .tsv files",
    "p3": "the records of bigscience/P3: one folder per task; or raw/ and templates/",
}


@gin.configurable(module="places")
def configured(folder: str | None = None) -> str | None:
    """What gin sets: `places.configured.folder = %DATA_DIR`.

    Args:
      folder: holds `superni/`, `crossfit/` and `p3/` (see `LAYOUT`). None: the environment variable
        MOE_PEFT_DATA. "embedded:samples": small files in the official formats, written on demand.
    """
    return folder or os.environ.get(VARIABLE)


def folder(benchmark: str) -> pathlib.Path:
    """The folder of one benchmark; a UserError that says what is expected where."""
    root = configured()
    if root is None:
        raise errors.UserError(
            f"The data of {benchmark} is needed and DATA_DIR is not set: give "
            f"--gin.DATA_DIR=FOLDER or the environment variable {VARIABLE}, where "
            f"FOLDER/{benchmark} is {LAYOUT[benchmark]}. To try without "
            f"data: --gin.DATA_DIR={SAMPLES}."
        )
    if root == SAMPLES:
        from moe_peft.data import samples

        return samples.folder() / benchmark
    path = pathlib.Path(root).expanduser() / benchmark
    if not path.is_dir():
        raise errors.UserError(
            f"There is no folder {path}; expected {LAYOUT[benchmark]}. DATA_DIR is {root!r}."
        )
    return path
