"""Names of parameters in transformers' T5 and in our unscanned tree (T5X's), both ways."""

from collections.abc import Mapping
import re


def _attention(theirs: str, ours: str, norm: str) -> dict[str, str]:
    maps = {"q": "query", "k": "key", "v": "value", "o": "out"}
    kernels = {f"{theirs}.{name}": f"{ours}/{own}/kernel" for name, own in maps.items()}
    return {**kernels, "layer_norm": f"{norm}/scale"}


_MLP = {
    **{f"DenseReluDense.{name}": f"mlp/{name}/kernel" for name in ("wi", "wi_0", "wi_1", "wo")},
    "layer_norm": "pre_mlp_layer_norm/scale",
}
# The numbered parts of a block: name there, without ".weight", to the path below "layers_N/".
_BLOCKS = {
    "encoder": (_attention("SelfAttention", "attention", "pre_attention_layer_norm"), _MLP),
    "decoder": (
        _attention("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        _attention(
            "EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"
        ),
        _MLP,
    ),
}
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# Theirs to ours, with "{}" for the number of a layer.
_PATHS = {
    "shared.weight": "token_embedder/embedding",
    "lm_head.weight": "decoder/logits_dense/kernel",
    **{f"{stack}.final_layer_norm.weight": f"{stack}/{stack}_norm/scale" for stack in _BLOCKS},
    **{f"{stack}.{_BIAS}": f"{stack}/relpos_bias/rel_embedding" for stack in _BLOCKS},
    **{
        f"{stack}.block.{{}}.layer.{number}.{theirs}.weight": f"{stack}/layers_{{}}/{ours}"
        for stack, parts in _BLOCKS.items()
        for number, part in enumerate(parts)
        for theirs, ours in part.items()
    },
}
_NAMES = {ours: theirs for theirs, ours in _PATHS.items()}


def path_of(name: str) -> str | None:
    """Returns the path in our unscanned tree of a weight named as in transformers, or None.

    >>> path_of("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'decoder/layers_3/encoder_decoder_attention/query/kernel'
    """
    return _translated(name, r"(?<=coder\.block\.)\d+(?=\.)", _PATHS)


def name_of(path: str) -> str | None:
    """Returns what transformers calls the parameter at a path of our unscanned tree, or None.

    >>> name_of("encoder/layers_0/pre_mlp_layer_norm/scale")
    'encoder.block.0.layer.1.layer_norm.weight'
    """
    return _translated(path, r"(?<=coder/layers_)\d+(?=/)", _NAMES)


def is_transposed(path: str) -> bool:
    """Whether torch stores the parameter the other way round: all linear maps and the biases."""
    return path.endswith(("/kernel", "/rel_embedding"))


def _translated(name: str, number: str, names: Mapping[str, str]) -> str | None:
    """Returns what a name is in `names`, where a layer's number, found by the pattern, is "{}"."""
    if name in names:  # of the whole network, or the bias, which is that of layer 0 only
        return names[name]
    layer = re.search(number, name)
    found = layer and names.get(re.sub(number, "{}", name, count=1))
    return found and found.format(layer[0])
