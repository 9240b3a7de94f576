"""What is at a path: told from the names of the files there, before anything is read."""

from etils import epath

from moe_peft import errors
from moe_peft.weights import (
    checkpoint_file,
    hugging_face,
    locations,
    records,
    safetensors_files,
    saved_run,
    t5_sizes,
    t5x_files,
    torch_files,
)

HUGGING_FACE, T5X, PEFT, ADAPTERS = "hf", "t5x", "peft", "ours"
FORMATS = (HUGGING_FACE, T5X, PEFT, ADAPTERS)


def detect(path: epath.PathLike) -> str:
    """Returns the format of a file or folder.

    "hf": a folder that transformers wrote, or a file of torch. "t5x": a checkpoint, or a run's
    folder with some. "peft": a folder of PEFT. "ours": a safetensors file or an adapter folder, as
    `moe-peft export` writes them.
    Raises UserError if nothing is there, another pickle than torch's, or nothing that is known.
    """
    found = locations.existing(path)
    if found.is_file():
        locations.refuse_pickle(found)
        if found.suffix in torch_files.SUFFIXES:
            return HUGGING_FACE
        if found.suffix != ".safetensors" and found.name != t5x_files.INDEX:
            raise errors.UserError(f"{found} is not a known file of weights; expected a folder.")
        return T5X if found.name == t5x_files.INDEX else ADAPTERS
    if saved_run.is_adapter_folder(found):  # It may open as PEFT's too.
        return ADAPTERS
    if (found / "adapter_config.json").exists():
        return PEFT
    if t5x_files.is_checkpoint(found) or t5x_files.steps(found):
        return T5X
    if any((found / name).exists() for name in (hugging_face.CONFIG, *hugging_face.WEIGHTS)):
        return HUGGING_FACE
    locations.refuse_pickle(found)
    raise errors.UserError(
        f"{found} holds no known weights; expected transformers' config.json with "
        "model.safetensors or pytorch_model.bin, a T5X checkpoint_N, or PEFT's adapter_config.json."
    )


def open_backbone(path: epath.PathLike, kind: str | None = None) -> checkpoint_file.CheckpointFile:
    """Returns the whole model at a path, headers only; kind None detects its format."""
    kind = kind or detect(path)
    folders = {HUGGING_FACE: hugging_face.open_folder, T5X: t5x_files.open_folder}
    if kind in folders:
        return folders[kind](path)
    if kind != ADAPTERS:
        raise errors.UserError(f"{path} is in the format {kind!r}, which holds no whole model.")
    found = safetensors_files.open_file(path)
    description = safetensors_files.read_metadata(path)
    is_told = bool(description.get("model"))
    if is_told:
        config = records.network(description, str(path)).config
    else:
        config = t5_sizes.recognise({name: leaf.shape for name, leaf in found.items()}, str(path))
    settings = description.get("hugging_face", {})
    told = {"settings": settings, "is_recognised": not is_told}
    return checkpoint_file.CheckpointFile(str(path), config, found, **told)
