"""The tensors of a PEFT folder by layer of our network, and their names there."""

from collections.abc import Sequence
import pathlib

from moe_peft import errors
from moe_peft.convert.peft import layers
from moe_peft.weights import leaves, locations, safetensors_files, t5_names

TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."

Tensors = dict[str, leaves.Leaves]  # layer of the unscanned network -> suffix -> tensor


def open_folder(folder: pathlib.Path, kind: str) -> Tensors:
    """Returns the tensors of a folder; only headers are read."""
    path = folder / TENSORS
    if not path.is_file():
        if (folder / _PICKLE).exists():
            locations.refuse_pickle(folder / _PICKLE)
        raise errors.UserError(f"{folder} has no {TENSORS}.")
    suffixes, found = layers.SUFFIXES[kind], {}
    for key, leaf in safetensors_files.open_file(path).items():
        suffix = next((one for one in suffixes if key.endswith(f".{one}")), "")
        module = key.removeprefix(_PREFIX).removesuffix(f".{suffix}")
        kernel = t5_names.path_of(f"{module}.weight") or ""
        if not suffix or not kernel.endswith("/kernel") or "/layers_" not in kernel:
            raise errors.UserError(
                f"{path}: {key} is not {' or '.join(suffixes)} of a linear map in a block of a T5."
            )
        found.setdefault(kernel.removesuffix("/kernel"), {})[suffix] = leaf
    for layer, own in found.items():
        for suffix in suffixes:
            if suffix not in own:
                raise errors.UserError(f"{path} has no {key_of(layer, suffix)}.")
    if not found:
        raise errors.UserError(f"{path} holds no tensors.")
    return found


def read(tensors: leaves.Leaves) -> layers.Arrays:
    """Reads the tensors of one layer."""
    return {suffix: leaf.read() for suffix, leaf in tensors.items()}


def aligned(tensors: Tensors, expected: Sequence[str]) -> Tensors:
    """Returns (IA)3 vectors that scale what wo reads, in a gated block, as those of wi_1."""

    def place(layer: str) -> str:
        gate = layer.removesuffix("wo") + "wi_1"
        is_moved = layer not in expected and gate in expected and gate not in tensors
        return gate if is_moved and layer.endswith("/wo") else layer

    return {place(layer): own for layer, own in tensors.items()}


def module_of(layer: str) -> str:
    """Returns what transformers calls a layer."""
    return t5_names.name_of(f"{layer}/kernel").removesuffix(".weight")


def key_of(layer: str, suffix: str) -> str:
    """Returns the key of one of its tensors."""
    return f"{_PREFIX}{module_of(layer)}.{suffix}"
