"""Which T5 a set of weights is, told from the shapes of its leaves."""

import ast
from collections.abc import Mapping
import dataclasses
import functools
import math
import operator
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp

from moe_peft import errors, patching
from moe_peft.config import gin_files
from moe_peft.models import t5
from moe_peft.weights import scan_layout

Shapes = Mapping[str, tuple[int, ...]]

# What a size file says: the fields of the config that have no default, and two that shapes tell.
_SIZES = (
    *(f.name for f in dataclasses.fields(t5.T5Config) if f.default is dataclasses.MISSING),
    *("mlp_activations", "logits_via_embedding"),
)
_sizes_of = operator.attrgetter(*_SIZES)


@functools.lru_cache(maxsize=16)
def shapes_of(config: t5.T5Config) -> Shapes:
    """Returns the shape of every parameter by its path."""
    module = t5.Transformer(config)
    tokens = jnp.ones((1, 2), jnp.int32)
    init = lambda rng: module.init(rng, tokens, tokens, tokens, enable_dropout=False)["params"]
    shapes = jax.eval_shape(init, jax.random.key(0))
    flat = {path: leaf.shape for path, leaf in patching.flatten(shapes).items()}
    return types.MappingProxyType(flat)


def recognise(shapes: Shapes, where: str) -> t5.T5Config:
    """Returns the config of the network that has these leaves, scanned or not.

    The number of heads is the number of rows of the relative position bias. A gated feed-forward
    block (`wi_0`, `wi_1`) is that of T5 1.1 and has its activation, gelu; a plain one has relu.

    Raises:
      UserError: leaves that any T5 has are missing `where` the weights are from; names the first.
    """

    def shape(path: str) -> tuple[int, ...]:
        if path not in shapes:
            raise errors.UserError(
                f"{where} is not a T5 encoder-decoder: it has no {path} among its {len(shapes)} "
                f"leaves.{errors.near(path, shapes)}"
            )
        return shapes[path]

    scanned = scan_layout.is_scanned(shapes)
    block = "encoder/encoder" if scanned else "encoder/layers_0"
    vocab_size, emb_dim = shape("token_embedder/embedding")
    bias = "encoder/encoder/relpos_bias" if scanned else "encoder/relpos_bias"
    num_heads = shape(f"{bias}/rel_embedding")[0]
    query = shape(f"{block}/attention/query/kernel")
    is_gated = f"{block}/mlp/wi_0/kernel" in shapes
    wi = shape(f"{block}/mlp/wi{'_0' if is_gated else ''}/kernel")

    def num_layers(stack: str) -> int:
        if scanned:
            return shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale")[patching.trees.LAYER_AXIS]
        found = (re.match(rf"{stack}/layers_(\d+)/", path) for path in shapes)
        shape(f"{stack}/layers_0/pre_mlp_layer_norm/scale")
        return 1 + max(int(match[1]) for match in found if match)

    return t5.T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=query[-1] if scanned else math.prod(query[1:]) // num_heads,
        mlp_dim=wi[-1],
        num_encoder_layers=num_layers("encoder"),
        num_decoder_layers=num_layers("decoder"),
        mlp_activations=("gelu", "linear") if is_gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        scan_layers=scanned,
    )


def name_of(config: t5.T5Config) -> str | None:
    """Returns the size file of gin/models/ that describes the network, such as "t5_1_1_xl"."""
    return _names().get(_sizes_of(config))


def config_named(name: str) -> t5.T5Config:
    """Returns the network of gin/models/NAME.gin."""
    known = {own: sizes for sizes, own in _names().items()}
    errors.check_one_of("The size of a T5", name, sorted(known))
    return t5.T5Config(**dict(zip(_SIZES, known[name], strict=True)))


def describe(config: t5.T5Config) -> str:
    """Returns the network's name and sizes for a message."""
    known = name_of(config) or "no size with a name"
    activations = ", ".join(config.mlp_activations)
    return (
        f"{known}: {config.num_encoder_layers} + {config.num_decoder_layers} layers, width "
        f"{config.emb_dim}, {config.num_heads} heads of {config.head_dim}, feed-forward "
        f"{config.mlp_dim} ({activations}), {config.vocab_size} ids, "
        f"{'tied' if config.logits_via_embedding else 'own'} output layer"
    )


def differences(ours: t5.T5Config, theirs: t5.T5Config) -> list[str]:
    """Returns the names of the sizes in which two networks differ."""
    return [field for field in _SIZES if getattr(ours, field) != getattr(theirs, field)]


@functools.cache
def _names() -> dict[tuple[Any, ...], str]:
    found = {}
    for path in sorted((gin_files.packaged_folder() / "models").glob("*.gin")):
        values = _bindings(path)
        if set(_SIZES) <= values.keys():
            found[tuple(values[field] for field in _SIZES)] = path.stem
    return found


def _bindings(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a size file binds of T5Config, without the side effects of gin."""
    text, found = path.read_text(), {}
    for name in re.findall(r"^include 'models/([^']+)'", text, re.MULTILINE):
        found |= _bindings(path.with_name(name))
    for field, value in re.findall(r"^T5Config\.(\w+) = ([^#\n]+)", text, re.MULTILINE):
        found[field] = ast.literal_eval(value.strip())
    return found
