"""The tensors of a PEFT folder: names, shapes, our leaves of them, and what PEFT computes."""

from collections.abc import Mapping, Sequence
import pathlib
import re
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from moe_peft import errors
from moe_peft.convert import adapter_trees
from moe_peft.convert.peft import config as config_lib
from moe_peft.convert.peft import places
from moe_peft.routing import task_routers
from moe_peft.weights import hugging_face, leaves, locations, t5_names

Arrays = adapter_trees.Arrays
Tensors = dict[str, leaves.Leaves]  # layer of the unscanned network -> suffix -> tensor

TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # as older versions of PEFT wrote them
_PREFIX = "base_model.model."  # dictionaries that people saved themselves may lack it
_HEAD = rf"{config_lib.HEAD}(\.modules_to_save(\.[^.]+)?)?\.weight"  # with an adapter's name
_LOGITS = f"router/{task_routers.LOGITS}"
SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "IA3": ("ia3_l",),
    "POLY": ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"),
}


def file_of(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file with the tensors of a folder; UserError if there is none."""
    for name in (TENSORS, PICKLED):
        if (folder / name).is_file():
            return folder / name
    locations.refuse_pickle(folder)
    raise errors.UserError(f"{folder} has no {TENSORS}.")


def open_folder(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[Tensors, leaves.Leaves]:
    """Returns the tensors of a folder, and of whole modules by our paths; only headers are read."""
    path, suffixes = file_of(folder), SUFFIXES[config["peft_type"]]
    found, whole, names = {}, {}, set()
    for key, leaf in hugging_face.open_file(path).items():
        own = key.removeprefix(_PREFIX)
        if config.get("modules_to_save") and re.fullmatch(_HEAD, own):
            place, suffix = whole, t5_names.path_of(f"{config_lib.HEAD}.weight")
        else:
            layer, suffix, name = _place(own, suffixes)
            if not suffix:
                raise errors.UserError(
                    f"{path}: {key} is not {' or '.join(suffixes)} of a linear map in a block of "
                    f"a T5. Where it was trained, {config_lib.MERGED}."
                )
            place, names = found.setdefault(layer, {}), names | {name}
        if suffix in place or len(names) > 1:
            several = " and ".join(sorted(map(str, names))) if len(names) > 1 else "two times"
            raise errors.UserError(f"{path}: {key} is there of several adapters, {several}.")
        place[suffix] = leaf
    keys = (key_of(layer, s) for layer, own in found.items() for s in suffixes if s not in own)
    for key in keys:  # the first one
        raise errors.UserError(f"{path} has no {key}.")
    if not found:
        raise errors.UserError(f"{path} holds no tensors.")
    if config.get("modules_to_save") and not whole:
        raise errors.UserError(f"{path} has no {_PREFIX}{config_lib.HEAD}.weight.")
    return found, whole


def _place(key: str, suffixes: Sequence[str]) -> tuple[str, str, str | None]:
    """Returns a tensor's layer, its suffix, and the adapter's name in a key that has one.

    The suffix is "" if it is none of a linear map in a block.
    """
    for suffix in suffixes:
        head, dot, tail = suffix.partition(".")
        found = re.fullmatch(rf"(.+)\.{head}(?:\.([^.]+))?{re.escape(dot + tail)}", key)
        kernel = found and t5_names.path_of(f"{found[1]}.weight") or ""
        if kernel.endswith("/kernel") and "/layers_" in kernel:
            return kernel.removesuffix("/kernel"), suffix, found[2]
    return "", "", None


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


def to_peft(kind: str, own: Arrays, alpha: float, scales_inputs: bool) -> Arrays:
    """Returns {suffix: tensor} of one layer from our leaves by name; B takes in `alpha`."""
    if kind == "IA3":
        return {"ia3_l": own["vectors"].reshape((1, -1) if scales_inputs else (-1, 1))}
    a, b = own["lora_a"], own["lora_b"]
    if kind == "LORA":
        parts = a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T
    else:
        parts = a, b * np.float32(alpha), own[_LOGITS].reshape(len(own[_LOGITS]), -1)
    return dict(zip(SUFFIXES[kind], map(np.ascontiguousarray, parts), strict=True))


def from_peft(
    config: Mapping[str, Any], layer: str, tensors: leaves.Leaves, rank: int, alpha: float
) -> Arrays:
    """Returns our leaves of one layer, with flat features; the inverse of `to_peft`.

    A LoRA of less than `rank` gets zeros, and B takes in what its scale is to alpha / rank. Of a
    Poly, B takes in 1 / `alpha`.
    """
    kind = config["peft_type"]
    parts = [tensors[suffix].read().astype(np.float32) for suffix in SUFFIXES[kind]]
    if kind == "IA3":
        return {"vectors": parts[0]}
    if kind == "LORA":
        (own_rank, own_alpha), (a, b) = places.rank_and_alpha(config, module_of(layer)), parts
        if own_alpha / own_rank != alpha / rank:
            b = b * np.float32(own_alpha / own_rank / (alpha / rank))
        more = (0, rank - own_rank), (0, 0)
        return {"lora_a": np.pad(a, more).T, "lora_b": np.pad(b.T, more)}
    a, b, logits = parts
    return {"lora_a": a, "lora_b": b / np.float32(alpha), _LOGITS: logits}


def shapes_of(
    config: Mapping[str, Any], layer: str, kernel: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the shapes that each tensor of a layer may have; its kernel is (inputs, outputs)."""
    kind, (inputs, outputs) = config["peft_type"], kernel
    if kind == "IA3":
        # What wi_1 returns may also be scaled as what wo reads.
        fitting = {"wo": [(1, inputs)], "wi_1": [(outputs, 1), (1, outputs)]}
        return {"ia3_l": tuple(fitting.get(layer.rpartition("/")[2], [(outputs, 1)]))}
    if kind == "LORA":
        rank, _ = places.rank_and_alpha(config, module_of(layer))
        found = (rank, inputs), (outputs, rank)
    else:
        splits, skills, rank = config["n_splits"], config["n_skills"], config["r"]
        found = (
            (splits, skills, inputs // splits, rank),
            (splits, skills, rank, outputs // splits),
            (config["n_tasks"], splits * skills),
        )
    return {suffix: (shape,) for suffix, shape in zip(SUFFIXES[kind], found, strict=True)}


def forward(
    config: Mapping[str, Any],
    layer: str,
    tensors: leaves.Leaves,
    x: Float[np.ndarray, "b t i"],
    y: Float[np.ndarray, "b t o"],
    task_ids: Int[np.ndarray, "b"],
) -> Float[np.ndarray, "b t o"]:
    """Returns what PEFT makes of a layer's inputs x and outputs y, in float64.

    (IA)3 scales y; give x for y where it scales inputs. Written from the methods' formulas, not
    with our adapters: conversions are checked against it.
    """
    kind = config["peft_type"]
    parts = [tensors[suffix].read().astype(np.float64) for suffix in SUFFIXES[kind]]
    if kind == "IA3":
        return y * parts[0].reshape(-1)
    if kind == "LORA":
        rank, alpha = places.rank_and_alpha(config, module_of(layer))
        return y + alpha / rank * (x @ parts[0].T @ parts[1].T)
    a, b, logits = parts
    splits, skills, rank = *a.shape[:2], config["r"]
    probs = 1 / (1 + np.exp(-logits[task_ids].reshape(-1, splits, skills)))
    weights = probs / (probs.sum(-1, keepdims=True) + 1e-12)
    a = np.einsum("bps,psjr->bpjr", weights, a).reshape(len(x), -1, rank)
    b = np.einsum("bps,psrk->brpk", weights, b).reshape(len(x), rank, -1)
    return y + np.einsum("bti,bir,bro->bto", x, a, b) / rank
