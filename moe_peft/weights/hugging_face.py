"""Hugging Face T5 in and out: config.json and safetensors, one file or several with an index.

T5 1.0 and 1.1, LM-adapted T5, T0, Flan-T5, mT5 and ByT5 share the names and the arithmetic; sizes,
activation and vocabulary are in config.json. Nothing here imports torch or transformers, and no
pickle is ever opened.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from etils import epath
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.weights import (
    checkpoint_file,
    leaves,
    locations,
    safetensors_files,
    t5_names,
    t5_sizes,
)

CONFIG = "config.json"
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
SHARD_BYTES = 5_000_000_000
_STRIP = 64  # rows

_MODEL_TYPES = ("t5", "mt5")
# The two that shapes tell apart; released models have no others.
_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
# What our network does not leave open.
_FIXED = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_NEVER_USED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read(
    path: epath.PathLike,
    dtype: str | None = None,
    *,
    scan_layers: bool = False,
    sharding: leaves.Sharding | leaves.ShardingOf | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> tuple[t5.T5Config, PyTree]:
    """Returns the config and the parameters of a folder that transformers wrote.

    Args:
      path: the folder, or one safetensors file in it.
      dtype: "float32", "bfloat16", or None for that of the file.
      scan_layers: the layout of the tree.
      sharding: where leaves go, such as `leaves.spread(mesh)`; None gives NumPy arrays.
      allow_missing: regular expressions of paths that may be missing; they are left out.
      allow_unused: regular expressions of keys that may have no place.

    Raises:
      UserError: the folder holds no T5, a pickle, a damaged file, or leaves that do not fit.
    """
    found = open_folder(path).scanned(scan_layers)
    params, _ = found.load(dtype, sharding, allow_missing, allow_unused)
    return found.config, params


def open_folder(path: epath.PathLike) -> checkpoint_file.Opened:
    """Reads config.json and the headers of the weights; raises UserError as `read` does."""
    folder = locations.existing(path)
    single = None
    if folder.is_file():
        folder, single = folder.parent, folder
        locations.refuse_pickle(single)
    settings = {}
    if (folder / CONFIG).exists():
        settings = safetensors_files.read_json(folder / CONFIG)
        _check_settings(settings, folder / CONFIG)
    if single is not None:
        tensors = safetensors_files.open_file(single)
    else:
        _check_has_weights(folder)
        tensors = safetensors_files.open_folder(folder)
    found, unused, known = _renamed(tensors, settings)
    config = _config(settings, folder / CONFIG)
    if config is None:
        config = t5_sizes.recognise({path: leaf.shape for path, leaf in found.items()}, str(path))
    return checkpoint_file.Opened(str(path), config, found, unused, known, settings)


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

    Args:
      folder: must not exist.
      config: of `params`, scanned or not.
      params: arrays or `leaves.Leaf`, nested or by path.
      dtype: "float32", "bfloat16", or None for each leaf's own.
      settings: config.json of the model that this one was made from: what is not a size is kept.
      copy_from: folder whose tokenizer and generation settings are copied.
      shard_bytes: weights beyond this go into numbered files with an index.

    Raises:
      UserError: the folder exists or cannot be written, or a leaf does not fit the config.
    """
    leaves.check_dtype(dtype)
    given = checkpoint_file.Opened(str(folder), config, leaves.flatten(params))
    given.report().check()
    found = given.scanned(False).leaves
    tensors = {
        t5_names.name_of(path): leaves.stored_as(_transposed(path, leaf), dtype)
        for path, leaf in found.items()
    }
    stored = sorted({leaf.dtype.name for leaf in tensors.values()})
    with locations.created(folder) as partial:
        safetensors_files.write_folder(partial, tensors, shard_bytes)
        described = _settings(config, settings or {}, stored[0] if len(stored) == 1 else "float32")
        (partial / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        if copy_from is not None:
            _copy_tokenizer(epath.Path(copy_from), partial)
    return pathlib.Path(folder)


def _renamed(
    tensors: leaves.Leaves, settings: Mapping[str, Any]
) -> tuple[leaves.Leaves, tuple[str, ...], dict[str, str]]:
    """Returns (leaves by our paths, keys without a place, keys left out with the reason)."""
    tensors, known = dict(tensors), {}
    embedding = "shared.weight"
    for copy in _COPIES:
        if copy in tensors and embedding not in tensors:
            tensors[embedding] = tensors.pop(copy)
        elif copy in tensors and _equal(tensors[copy], tensors[embedding]):
            known[copy] = f"the same as {embedding}"
    if _NEVER_USED in tensors:
        known[_NEVER_USED] = "no T5 uses it"
    if embedding in tensors and settings:
        _output_layer(tensors, known, embedding, _is_scaled(settings))
    found, unused = {}, []
    for key, leaf in tensors.items():
        path = t5_names.path_of(key)
        if key in known:
            continue
        if path is None:
            unused.append(key)
        else:
            found[path] = _transposed(path, leaf)
    return found, tuple(unused), known


def _is_scaled(settings: Mapping[str, Any]) -> bool:
    """Whether what enters the output layer is scaled by d ** -0.5, as in T5 1.0.

    transformers 4 scales exactly where the layer is tied to the embedding; version 5 ties always
    and says separately whether it scales. An mT5 never scales.
    """
    if settings["model_type"] == "mt5":
        return False
    return settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True))


def _output_layer(
    tensors: leaves.Leaves, known: dict[str, str], embedding: str, is_scaled: bool
) -> None:
    """Our network scales exactly where it has no output layer of its own."""
    head = tensors.get("lm_head.weight")
    if is_scaled and head is not None and _equal(head, tensors[embedding]):
        known["lm_head.weight"] = f"the same as {embedding}"
    elif not is_scaled and head is None:
        tensors["lm_head.weight"] = tensors[embedding]


def _equal(one: leaves.Leaf, other: leaves.Leaf) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    as_bytes = lambda leaf: leaf.read().reshape(-1).view(np.uint8)
    return np.array_equal(as_bytes(one), as_bytes(other))


def _transposed(path: str, leaf: leaves.Leaf) -> leaves.Leaf:
    if not t5_names.is_transposed(path) or leaf.ndim != 2:
        return leaf
    return leaves.mapped(leaf, leaf.shape[::-1], _turned)


def _turned(matrix: np.ndarray) -> np.ndarray:
    """Returns the transpose, copied in strips that stay in the cache: three times as fast."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _STRIP):
        turned[:, start : start + _STRIP] = matrix[start : start + _STRIP].T
    return turned


def _check_has_weights(folder: epath.Path) -> None:
    weights = (safetensors_files.SINGLE, safetensors_files.INDEX)
    if any((folder / name).exists() for name in weights):
        return
    for path in sorted(folder.iterdir()):
        locations.refuse_pickle(path)
    raise errors.UserError(
        f"{folder} has neither {weights[0]} nor {weights[1]}; expected a folder that transformers' "
        "save_pretrained wrote."
    )


def _check_settings(settings: Mapping[str, Any], path: epath.Path) -> None:
    kind = settings.get("model_type")
    if kind not in _MODEL_TYPES:
        what = "" if settings.get("is_encoder_decoder") else ", which has no encoder and decoder"
        raise errors.UserError(
            f"{path}: model_type is {kind!r}{what}; expected {' or '.join(_MODEL_TYPES)} "
            "(T5, LM-adapted T5, T0, Flan-T5, ByT5, mT5)."
        )
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise errors.UserError(
                f"{path}: {key} is {settings[key]!r}; this network has {value!r}."
            )


def _config(settings: Mapping[str, Any], path: epath.Path) -> t5.T5Config | None:
    if not settings:
        return None

    def get(key: str) -> Any:
        if key not in settings:
            raise errors.UserError(f"{path} has no {key!r}.")
        return settings[key]

    is_mt5 = settings["model_type"] == "mt5"
    projection = settings.get("feed_forward_proj", "gated-gelu" if is_mt5 else "relu")
    if projection not in _ACTIVATIONS:
        raise errors.UserError(
            f"{path}: feed_forward_proj is {projection!r}; expected {', '.join(_ACTIVATIONS)}."
        )
    num_layers = get("num_layers")
    num_decoder_layers = settings.get("num_decoder_layers")
    return t5.T5Config(
        vocab_size=get("vocab_size"),
        emb_dim=get("d_model"),
        num_heads=get("num_heads"),
        head_dim=get("d_kv"),
        mlp_dim=get("d_ff"),
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers if num_decoder_layers is None else num_decoder_layers,
        mlp_activations=_ACTIVATIONS[projection],
        logits_via_embedding=_is_scaled(settings),
    )


def _settings(config: t5.T5Config, old: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns config.json of a network; what is not a size is kept from an old one."""
    projections = {activations: name for name, activations in _ACTIVATIONS.items()}
    if config.mlp_activations not in projections:
        raise errors.UserError(
            f"transformers' T5 has no feed-forward block of {config.mlp_activations}."
        )
    is_tied = config.logits_via_embedding
    kind = "t5" if is_tied else old.get("model_type", "t5")  # an mT5 does not scale
    scaled = {"scale_decoder_outputs": is_tied} if "scale_decoder_outputs" in old else {}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **_FIXED,
        **old,
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": projections[config.mlp_activations],
        # transformers 5 says so where it scales, and stores the layer where it is the embedding's.
        "tie_word_embeddings": is_tied,
        **scaled,
        "torch_dtype" if "torch_dtype" in old else "dtype": dtype,
    }


def _copy_tokenizer(source: epath.Path, target: pathlib.Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
