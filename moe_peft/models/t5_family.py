"""What the rest of the package must know of T5: names, sizes from shapes, operations."""

import dataclasses
import math
import re

from moe_peft import patching
from moe_peft.models import family, t5


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
_BIAS = "block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_RELPOS = "relpos_bias/rel_embedding"
_HUGGING_FACE = {
    "shared.weight": "token_embedder/embedding",
    "lm_head.weight": "decoder/logits_dense/kernel",
    **{f"{stack}.final_layer_norm.weight": f"{stack}/{stack}_norm/scale" for stack in _BLOCKS},
    **{f"{stack}.{_BIAS.format(0)}": f"{stack}/{_RELPOS}" for stack in _BLOCKS},
    **{f"{stack}.{_BIAS}": f"{stack}/layers_{{}}/{_RELPOS}" for stack in _BLOCKS},  # of UMT5
    **{
        f"{stack}.block.{{}}.layer.{number}.{theirs}.weight": f"{stack}/layers_{{}}/{ours}"
        for stack, parts in _BLOCKS.items()
        for number, part in enumerate(parts)
        for theirs, ours in part.items()
    },
}


def recognise(shapes: family.Shapes) -> t5.T5Config:
    """Returns the config of the T5 that has these leaves, scanned or not.

    The number of heads is the number of rows of the relative position bias. Where shapes do not
    tell, it is what T5 has: a gated feed-forward block (`wi_0`, `wi_1`) has the activation of
    T5 1.1, gelu, a plain one relu; distances reach to 128; scanned layers began with one bias.
    """
    scanned = any(patching.trees.stack(path) for path in shapes)
    block = "encoder/encoder" if scanned else "encoder/layers_0"
    vocab_size, emb_dim = shapes["token_embedder/embedding"]
    in_layers = scanned or f"{block}/{_RELPOS}" in shapes
    bias = shapes[f"{block}/{_RELPOS}" if in_layers else f"encoder/{_RELPOS}"]
    num_heads = bias[0]
    query = shapes[f"{block}/attention/query/kernel"]
    is_gated = f"{block}/mlp/wi_0/kernel" in shapes
    wi = shapes[f"{block}/mlp/wi{'_0' if is_gated else ''}/kernel"]

    def num_layers(stack: str) -> int:
        if scanned:
            return shapes[f"{stack}/{stack}/pre_mlp_layer_norm/scale"][patching.trees.LAYER_AXIS]
        found = (re.match(rf"{stack}/layers_(\d+)/", path) for path in shapes)
        _ = shapes[f"{stack}/layers_0/pre_mlp_layer_norm/scale"]
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
        relpos_buckets=bias[-1],
        relpos_in_every_layer=in_layers and not scanned,
    )


def operations(config: t5.T5Config, inputs: int, targets: int) -> float:
    """Operations of one pass over one row of so many tokens.

    The encoder's weights meet the inputs, the decoder's the targets, except keys and values of
    attention to the inputs.
    """
    attended = config.num_heads * config.head_dim
    projection = config.emb_dim * attended  # query, key, value and out each
    feed_forward = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
    encoder = inputs * (4 * projection + feed_forward) + 2 * inputs**2 * attended
    decoder = (
        targets * (6 * projection + feed_forward)
        + inputs * 2 * projection
        + 2 * targets * (targets + inputs) * attended
    )
    logits = targets * config.emb_dim * config.vocab_size
    layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
    return 2.0 * (layers + logits)


def describe(config: t5.T5Config) -> str:
    """Returns the sizes for a message."""
    default = t5.T5Config
    bias = ""
    if config.relpos_in_every_layer:
        bias = ", position biases in every layer"
    if config.relpos_buckets != default.relpos_buckets:
        bias += f", {config.relpos_buckets} buckets of distances"
    if config.relpos_max_distance != default.relpos_max_distance:
        bias += f", distances to {config.relpos_max_distance}"
    return (
        f"{config.num_encoder_layers} + {config.num_decoder_layers} layers, width "
        f"{config.emb_dim}, {config.num_heads} heads of {config.head_dim}, feed-forward "
        f"{config.mlp_dim} ({', '.join(config.mlp_activations)}), {config.vocab_size} ids, "
        f"{'tied' if config.logits_via_embedding else 'own'} output layer{bias}"
    )


_RELPOS_SIZES = ("relpos_buckets", "relpos_max_distance", "relpos_in_every_layer")
_NEEDED = (f.name for f in dataclasses.fields(t5.T5Config) if f.default is dataclasses.MISSING)

FAMILY = family.Family(
    "t5",
    "T5 encoder-decoder",
    config=t5.T5Config,
    network=t5.Transformer,
    paths=patching.paths.T5,
    sizes=(*_NEEDED, "mlp_activations", "logits_via_embedding", *_RELPOS_SIZES),
    recognise=recognise,
    operations=operations,
    describe=describe,
    hugging_face=_HUGGING_FACE,
)
