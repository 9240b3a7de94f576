"""Names of parameters in transformers' T5 and in our unscanned tree (T5X's), both ways."""

import re

_WHOLE = {
    "shared.weight": "token_embedder/embedding",
    "lm_head.weight": "decoder/logits_dense/kernel",
    "encoder.final_layer_norm.weight": "encoder/encoder_norm/scale",
    "decoder.final_layer_norm.weight": "decoder/decoder_norm/scale",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
        "encoder/relpos_bias/rel_embedding"
    ),
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
        "decoder/relpos_bias/rel_embedding"
    ),
}
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_SELF = [
    *(
        (f"SelfAttention.{theirs}", f"attention/{ours}/kernel")
        for theirs, ours in _ATTENTION.items()
    ),
    ("layer_norm", "pre_attention_layer_norm/scale"),
]
_CROSS = [
    *(
        (f"EncDecAttention.{theirs}", f"encoder_decoder_attention/{ours}/kernel")
        for theirs, ours in _ATTENTION.items()
    ),
    ("layer_norm", "pre_cross_attention_layer_norm/scale"),
]
_MLP = [
    *((f"DenseReluDense.{name}", f"mlp/{name}/kernel") for name in ("wi", "wi_0", "wi_1", "wo")),
    ("layer_norm", "pre_mlp_layer_norm/scale"),
]
_DECODER_SELF = [
    (
        theirs,
        ours.replace("pre_attention", "pre_self_attention").replace(
            "attention/", "self_attention/"
        ),
    )
    for theirs, ours in _SELF
]
# In a block: "layer.NUMBER.REST" without ".weight" to the path below "layers_N/".
_LAYER = {
    "encoder": {
        f"{number}.{theirs}": ours
        for number, part in enumerate((_SELF, _MLP))
        for theirs, ours in part
    },
    "decoder": {
        f"{number}.{theirs}": ours
        for number, part in enumerate((_DECODER_SELF, _CROSS, _MLP))
        for theirs, ours in part
    },
}
_BACK = {stack: {ours: theirs for theirs, ours in _LAYER[stack].items()} for stack in _LAYER}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}


def path_of(name: str) -> str | None:
    """Returns the path in our unscanned tree of a weight named as in transformers, or None.

    >>> path_of("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'decoder/layers_3/encoder_decoder_attention/query/kernel'
    """
    if name in _WHOLE:
        return _WHOLE[name]
    found = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(.+)\.weight", name)
    if not found:
        return None
    stack, layer, rest = found.groups()
    ours = _LAYER[stack].get(rest)
    return ours and f"{stack}/layers_{layer}/{ours}"


def name_of(path: str) -> str | None:
    """Returns what transformers calls the parameter at a path of our unscanned tree, or None.

    >>> name_of("encoder/layers_0/pre_mlp_layer_norm/scale")
    'encoder.block.0.layer.1.layer_norm.weight'
    """
    if path in _WHOLE_BACK:
        return _WHOLE_BACK[path]
    found = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.+)", path)
    if not found:
        return None
    stack, layer, rest = found.groups()
    theirs = _BACK[stack].get(rest)
    return theirs and f"{stack}.block.{layer}.layer.{theirs}.weight"


def is_transposed(path: str) -> bool:
    """Whether torch stores the parameter the other way round: all linear maps and the biases."""
    return path.endswith(("/kernel", "/rel_embedding"))
