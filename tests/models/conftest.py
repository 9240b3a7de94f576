"""Weights of other implementations as our parameter trees, for the tests of the network."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
SUBLAYERS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": (
        "pre_self_attention_layer_norm",
        "pre_cross_attention_layer_norm",
        "pre_mlp_layer_norm",
    ),
}


def path_of(name):
    """The path in our unscanned tree of a weight named as in transformers."""
    whole = {
        "shared.weight": "token_embedder/embedding",
        "lm_head.weight": "logits_dense/kernel",
        "encoder.final_layer_norm.weight": "encoder/encoder_norm/scale",
        "decoder.final_layer_norm.weight": "decoder/decoder_norm/scale",
    }
    if name in whole:
        return whole[name].replace("logits_dense", "decoder/logits_dense")
    stack, layer, sublayer, rest = re.fullmatch(
        r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(.+)\.weight", name
    ).groups()
    module, _, part = rest.partition(".")
    if part == "relative_attention_bias":
        return f"{stack}/relpos_bias/rel_embedding"
    if module == "layer_norm":
        return f"{stack}/layers_{layer}/{SUBLAYERS[stack][int(sublayer)]}/scale"
    names = {
        "DenseReluDense": "mlp",
        "EncDecAttention": "encoder_decoder_attention",
        "SelfAttention": "attention" if stack == "encoder" else "self_attention",
    }
    return f"{stack}/layers_{layer}/{names[module]}/{ATTENTION.get(part, part)}/kernel"


def nest(flat):
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


@pytest.fixture
def from_transformers():
    """A function from {name in transformers: array} to our unscanned tree.

    Linear maps are transposed, so that gradients are converted the same way.
    """

    def convert(weights):
        is_row_map = lambda name: "norm" in name or name == "shared.weight"
        return nest(
            {path_of(k): jnp.asarray(v if is_row_map(k) else v.T) for k, v in weights.items()}
        )

    return convert


@pytest.fixture
def to_scanned():
    """A function from an unscanned tree to the scanned one of the same network."""

    def convert(params, head_dim):
        params = jax.tree.map(np.asarray, params)  # numpy: nothing to compile
        for stack in ("encoder", "decoder"):
            old = params[stack]
            names = sorted(name for name in old if name.startswith("layers_"))
            split = lambda path, x: _split_heads(jax.tree_util.keystr(path), x, head_dim)
            layers = [
                {
                    **jax.tree_util.tree_map_with_path(split, old[name]),
                    "relpos_bias": old["relpos_bias"],
                }
                for name in names
            ]
            new = {k: v for k, v in old.items() if k not in (*names, "relpos_bias")}
            new[stack] = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *layers)
            params = {**params, stack: new}
        return jax.tree.map(jnp.asarray, params)

    return convert


def _split_heads(path, x, head_dim):
    if re.search("query|key|value", path):
        return x.reshape(x.shape[0], -1, head_dim)
    if "'out'" in path:
        return x.reshape(-1, head_dim, x.shape[1])
    return x
