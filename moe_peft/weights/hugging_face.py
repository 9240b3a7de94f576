"""Hugging Face T5 in and out: config.json and weights, one file or several with an index.

T5 1.0 and 1.1, LM-adapted T5, T0, Flan-T5, mT5, ByT5, UL2 and Ankh share the names and the
arithmetic, and UMT5 has position biases in every layer; config.json has sizes and options. Files of
torch.save are read where there are no safetensors. Nothing here imports torch or transformers, and
no pickle is ever run.
"""

from collections.abc import Collection, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from etils import epath
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors
from moe_peft.models import special_ids, t5
from moe_peft.weights import (
    checkpoint_file,
    feed_forward,
    hf_kinds,
    hub,
    leaves,
    locations,
    safetensors_files,
    scan_layout,
    t5_names,
    t5_sizes,
    torch_files,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
COPIED = (*hub.TOKENIZER_FILES, GENERATION)
WEIGHTS = (safetensors_files.SINGLE, safetensors_files.INDEX)  # the first that is there
WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD_BYTES = 5_000_000_000
_STRIP = 64  # rows

_MODEL_TYPES = ("t5", "mt5", "umt5")
# Sizes: what config.json calls them, and what our config does.
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
}
_OPTIONS = {
    "relative_attention_num_buckets": "relpos_buckets",
    "relative_attention_max_distance": "relpos_max_distance",
}
# What our network does not leave open.
_FIXED = {
    "layer_norm_epsilon": 1e-6,
}
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_NEVER_USED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read(
    path: epath.PathLike, dtype: str | None = None, **options: Any
) -> tuple[t5.T5Config, PyTree]:
    """Returns `CheckpointFile.read` of a folder that transformers wrote, or of one file in it."""
    return open_folder(path).read(dtype, **options)


def open_folder(path: epath.PathLike) -> checkpoint_file.CheckpointFile:
    """Reads config.json and headers; UserError if there is no T5, another pickle, or damage."""
    place = locations.existing(hub.local(os.fspath(path)))
    folder, settings = place.parent if place.is_file() else place, {}
    if (folder / CONFIG).exists():
        settings = hf_kinds.with_kind(safetensors_files.read_json(folder / CONFIG))
        check_settings(settings, folder / CONFIG)
        ids = hf_kinds.ids_of(settings, _generation(folder), folder / CONFIG)
    found, unused, known = _renamed(open_tensors(place), settings, folder)
    if settings:
        config = config_of(settings, folder / CONFIG)
        config = dataclasses.replace(config, **{f"{n}_id": i for n, i in vars(ids).items()})
    else:
        config = t5_sizes.recognise({name: leaf.shape for name, leaf in found.items()}, str(path))
    told = {"settings": settings, "is_recognised": not settings}
    return checkpoint_file.CheckpointFile(str(path), config, found, unused, known, **told)


def _generation(folder: epath.Path) -> Mapping[str, Any]:
    path = folder / GENERATION
    return safetensors_files.read_json(path) if path.exists() else {}


def open_tensors(place: epath.Path) -> leaves.Leaves:
    """Returns the tensors of a file or folder by transformers' names; only headers are read."""
    within = [place / name for name in WEIGHTS if (place / name).exists()]
    found = within[0] if within else place
    locations.refuse_pickle(found)
    if found.is_dir():
        raise errors.UserError(
            f"{place} has neither {' nor '.join(WEIGHTS)}; expected a folder that transformers' "
            "save_pretrained wrote."
        )
    is_index = found.suffix == ".json"
    return safetensors_files.open_parts(found, open_file) if is_index else open_file(found)


def open_file(path: epath.Path) -> leaves.Leaves:
    """Returns the tensors of a file of safetensors or of torch; only headers are read."""
    files = torch_files if path.suffix in torch_files.SUFFIXES else safetensors_files
    return files.open_file(path)


def write(
    folder: pathlib.Path | str,
    config: t5.T5Config,
    params: PyTree | Mapping[str, leaves.Leaf],
    *,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
    copy_from: pathlib.Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes a folder that transformers loads; leaf by leaf, and whole or not at all.

    Raises UserError if the folder exists or cannot be written, or if a leaf does not fit.

    Args:
      folder: must not exist.
      config: of `params`, scanned or not.
      params: arrays or `leaves.Leaf`, nested or by path.
      dtype: "float32", "bfloat16", or None for each leaf's own.
      settings: config.json of the model that this one was made from: what is not a size is kept.
      copy_from: folder whose tokenizer and generation settings are copied.
      shard_bytes: weights beyond this go into numbered files with an index.
    """
    given = checkpoint_file.CheckpointFile(str(folder), config, leaves.flatten(params))
    given.report().check()
    tensors = {
        t5_names.name_of(path): leaves.cast_when_read(_transposed(path, leaf), dtype)
        for path, leaf in given.scanned(False).leaves.items()
    }
    stored, old = sorted({leaf.dtype.name for leaf in tensors.values()}), settings or {}
    was = old.get("torch_dtype", old.get("dtype", "float32"))  # a folder may store two
    is_copy = hf_kinds.ties_without_scale(old) and _HEAD in tensors
    is_copy = is_copy and _equal(tensors[_HEAD], tensors[_EMBEDDING])
    if is_copy:  # as the source had it
        del tensors[_HEAD]
    described = _settings(config, old, was if was in stored else stored[0], is_copy)
    with locations.created(folder) as partial:
        partial.mkdir()
        safetensors_files.write_folder(partial, tensors, shard_bytes)
        (partial / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        if copy_from is not None:
            for source in (epath.Path(copy_from) / name for name in COPIED):
                if source.exists():
                    (partial / source.name).write_bytes(source.read_bytes())
    return pathlib.Path(folder)


def _renamed(
    tensors: leaves.Leaves, settings: Mapping[str, Any], folder: epath.Path
) -> tuple[leaves.Leaves, tuple[str, ...], dict[str, str]]:
    """Returns (leaves by our paths, keys without a place, keys left out with the reason)."""
    tensors, known = dict(tensors), {}
    for copy in _COPIES:
        if copy in tensors and _EMBEDDING not in tensors:
            tensors[_EMBEDDING] = tensors.pop(copy)
        elif copy in tensors and _equal(tensors[copy], tensors[_EMBEDDING]):
            known[copy] = f"the same as {_EMBEDDING}"
    if _NEVER_USED in tensors:
        known[_NEVER_USED] = "no T5 uses it"
    if _EMBEDDING in tensors and settings:
        # Our network scales exactly where it has no output layer of its own.
        is_scaled, head = hf_kinds.is_scaled(settings), tensors.get(_HEAD)
        if is_scaled and head is not None and _equal(head, tensors[_EMBEDDING]):
            known[_HEAD] = f"the same as {_EMBEDDING}"
        elif is_scaled and head is not None:
            hf_kinds.check_head(settings, folder)
        elif not is_scaled and head is None:
            tensors[_HEAD] = tensors[_EMBEDDING]
    paths = {key: t5_names.path_of(key) for key in tensors if key not in known}
    if _has_biases_in_layers(settings, paths.values()):
        # transformers' names do not say whose the first layer's are, which a T5 shares.
        first = {
            f"{stack}/{scan_layout.BIAS}": f"{stack}/layers_0/{scan_layout.BIAS}"
            for stack in ("encoder", "decoder")
        }
        paths = {key: first.get(path, path) for key, path in paths.items()}
    found = {path: _transposed(path, tensors[key]) for key, path in paths.items() if path}
    return found, tuple(key for key, path in paths.items() if not path), known


def _has_biases_in_layers(settings: Mapping[str, Any], paths: Collection[str | None] = ()) -> bool:
    """Whether the network is a UMT5, by config.json or, where there is none, by names."""
    if settings:
        return settings["model_type"] == "umt5"
    return scan_layout.has_biases_in_layers([path for path in paths if path])


def _equal(one: leaves.Leaf, other: leaves.Leaf) -> bool:
    # Bytes, not numbers: NaN is equal to itself here.
    as_bytes = lambda leaf: leaf.read().reshape(-1).view(np.uint8)
    is_alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return is_alike and np.array_equal(as_bytes(one), as_bytes(other))


def _transposed(path: str, leaf: leaves.Leaf) -> leaves.Leaf:
    if not t5_names.is_transposed(path) or len(leaf.shape) != 2:
        return leaf
    return leaves.mapped(leaf, leaf.shape[::-1], _turned)


def _turned(matrix: np.ndarray) -> np.ndarray:
    """Returns the transpose, copied in strips that stay in the cache: three times as fast."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _STRIP):
        turned[:, start : start + _STRIP] = matrix[start : start + _STRIP].T
    return turned


def check_settings(settings: Mapping[str, Any], path: epath.PathLike) -> None:
    """Raises UserError unless config.json, at `path`, is of a network that opens."""
    hf_kinds.check(settings, path, _MODEL_TYPES)
    for key, value in _FIXED.items():
        if (given := settings.get(key, value)) != value:
            raise errors.UserError(f"{path}: {key} is {given!r}; this network has {value!r}.")


def config_of(settings: Mapping[str, Any], path: epath.PathLike) -> t5.T5Config:
    """Returns the network of a checked config.json, but for its special ids."""
    given = dict(settings)
    if given.get("num_decoder_layers") is None:  # as many as the encoder has
        given["num_decoder_layers"] = given.get("num_layers")
    missing = [key for key in _SIZES if key not in given]
    if missing:
        raise errors.UserError(f"{path} has no {missing[0]!r}.")
    return t5.T5Config(
        **{ours: given[theirs] for theirs, ours in _SIZES.items()},
        **{ours: given[theirs] for theirs, ours in _OPTIONS.items() if theirs in given},
        mlp_activations=feed_forward.activations(settings, path),
        dropout_rate=given.get("dropout_rate", 0.1),
        logits_via_embedding=hf_kinds.is_scaled(settings),
        relpos_in_every_layer=_has_biases_in_layers(settings),
    )


def _settings(
    config: t5.T5Config, old: Mapping[str, Any], dtype: str, is_copy: bool
) -> dict[str, Any]:
    """Returns config.json of a network; what is not a size is kept from an old one.

    `is_copy`: the output layer is the embedding, and not scaled.
    """
    dtype = {"torch_dtype" if "torch_dtype" in old else "dtype": dtype}
    if old and _says(config, old) and is_copy == hf_kinds.ties_without_scale(old):
        told = old.get("torch_dtype", old.get("dtype")) or "float32"
        return {**old, **({} if told in dtype.values() else dtype)}
    is_tied, kind = config.logits_via_embedding, old.get("model_type", "t5")
    if config.relpos_in_every_layer:
        kind = "umt5"
    elif is_tied or kind == "umt5":
        kind = "t5"  # an mT5 does not scale
    classes = [f"{kind.upper()}ForConditionalGeneration"]
    if kind == old.get("model_type"):
        classes = old.get("architectures", classes)
    scaled = {"scale_decoder_outputs": is_tied} if "scale_decoder_outputs" in old else {}
    return {
        "is_encoder_decoder": True,
        "dropout_rate": config.dropout_rate,
        **_FIXED,
        **old,
        "architectures": classes,
        **{theirs: getattr(config, f"{ours}_id") for ours, theirs in hf_kinds.IDS.items()},
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _OPTIONS).items()},
        **feed_forward.said(config.mlp_activations, old),
        # transformers 5 says so where it scales, and stores the layer where it is the embedding's.
        "tie_word_embeddings": is_tied or is_copy,
        **scaled,
        **dtype,
    }


def _says(config: t5.T5Config, settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of that network; one that leaves out a size is not."""
    if not settings.keys() >= _SIZES.keys() - {"num_decoder_layers"}:
        return False
    ids = hf_kinds.ids_of(settings, {}, CONFIG)
    differing = t5_sizes.differences(config, config_of(settings, CONFIG))
    return not differing and ids == special_ids.of_config(config)
