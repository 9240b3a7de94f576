"""Small models of T5X's networks, and the built-in trainer's of the same shape."""

import functools
import importlib
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import seqio

from moe_peft import patching
from moe_peft.models import encoder_decoder
from moe_peft.models import t5 as built_in_t5

SIZES = {
    "vocab_size": 32,
    "emb_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0,
}
BATCH = {
    "encoder_input_tokens": jnp.asarray([[5, 6, 7, 1], [9, 8, 1, 0]]),
    "decoder_input_tokens": jnp.asarray([[0, 3, 4], [0, 11, 0]]),
    "decoder_target_tokens": jnp.asarray([[3, 4, 1], [11, 1, 0]]),
    "decoder_loss_weights": jnp.asarray([[1, 1, 1], [1, 1, 0]]),
    "task_ids": jnp.asarray([2, 0]),
}


def load(*names: str) -> types.SimpleNamespace:
    """Modules by the last part of their names."""
    return types.SimpleNamespace(
        **{name.rsplit(".", 1)[-1]: importlib.import_module(name) for name in names}
    )


T5X = load(
    "t5x.adafactor",
    "t5x.models",
    "t5x.optimizers",
    "t5x.partitioning",
    "t5x.trainer",
    "t5x.train_state",
)


def network(name: str):
    """T5X's network "t5", or "scalable_t5": scanned, and part of a layer computed again."""
    module = importlib.import_module(f"t5x.examples.{name}.network")
    remat = {"remat_policy": "minimal"} if name == "scalable_t5" else {}
    return module.Transformer(module.T5Config(**SIZES, dtype=jnp.float32, **remat))


def flaxformer(scan_layers: bool = False):
    """Flaxformer's T5 1.1, as its gin files build it."""
    parts = load(
        "flaxformer.architectures.t5.t5_architecture",
        "flaxformer.components.attention.dense_attention",
        "flaxformer.components.dense",
        "flaxformer.components.embedding",
        "flaxformer.components.layer_norm",
        "flaxformer.components.relative_position_biases",
    )
    init, dtype = nn.initializers.variance_scaling(1.0, "fan_in", "normal"), jnp.float32
    dropout = functools.partial(nn.Dropout, rate=0.0, broadcast_dims=(-2,))
    attention = functools.partial(
        parts.dense_attention.MultiHeadDotProductAttention,
        num_heads=SIZES["num_heads"],
        head_dim=SIZES["head_dim"],
        dtype=dtype,
        kernel_init=init,
        use_bias=False,
        broadcast_dropout=True,
        dropout_rate=0.0,
    )
    layer = {
        "dropout_factory": dropout,
        "layer_norm_factory": parts.layer_norm.T5LayerNorm,
        "relative_position_bias_factory": functools.partial(
            parts.relative_position_biases.RelativePositionBiases,
            num_buckets=32,
            max_distance=128,
            num_heads=SIZES["num_heads"],
            dtype=dtype,
            embedding_init=init,
        ),
        "scanned": scan_layers,
    }
    mlp = functools.partial(
        parts.dense.MlpBlock,
        use_bias=False,
        intermediate_dim=SIZES["mlp_dim"],
        activations=SIZES["mlp_activations"],
        kernel_init=init,
        intermediate_dropout_rate=0.0,
        final_dropout_rate=0.0,
        dtype=dtype,
    )
    t5 = parts.t5_architecture
    stack = {
        "num_layers": 2,
        "layer_norm_factory": parts.layer_norm.T5LayerNorm,
        "dtype": dtype,
        "scan_layers": scan_layers,
    }
    return t5.EncoderDecoder(
        shared_token_embedder_factory=lambda: parts.embedding.Embed(
            num_embeddings=SIZES["vocab_size"],
            features=SIZES["emb_dim"],
            cast_input_dtype=jnp.int32,
            dtype=dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="token_embedder",
        ),
        encoder_factory=lambda shared_token_embedder: t5.Encoder(
            shared_token_embedder=shared_token_embedder,
            layer_factory=lambda shared_relative_position_bias: t5.EncoderLayer(
                attention=attention(), mlp=mlp(), **layer
            ),
            input_dropout_factory=dropout,
            output_dropout_factory=dropout,
            **stack,
        ),
        decoder_factory=lambda shared_token_embedder: t5.Decoder(
            shared_token_embedder=shared_token_embedder,
            layer_factory=lambda shared_relative_position_bias: t5.DecoderLayer(
                self_attention=attention(),
                encoder_decoder_attention=attention(),
                mlp=mlp(),
                **layer,
            ),
            dropout_factory=dropout,
            output_logits_factory=None,
            **stack,
        ),
        scan_layers=scan_layers,
    )


def adafactor(**settings):
    """As T5X's gin files set it up."""
    rules = T5X.adafactor.standard_logical_factor_rules()
    return T5X.adafactor.Adafactor(decay_rate=0.8, logical_factor_rules=rules, **settings)


def base_model(module, optimizer=None, **settings):
    """T5X's model around a network, by default "t5", as its gin files build it."""
    vocabulary = seqio.ByteVocabulary()
    settings = {"loss_normalizing_factor": "NUM_REAL_TARGET_TOKENS", **settings}
    return T5X.models.EncoderDecoderModel(
        network(module) if isinstance(module, str) else module,
        vocabulary,
        vocabulary,
        optimizer or adafactor(),
        **settings,
    )


def built_in(method, scan_layers: bool = False, **loss):
    """The built-in trainer's model with the method's adapters."""
    module = built_in_t5.Transformer(built_in_t5.T5Config(**SIZES, scan_layers=scan_layers))
    return encoder_decoder.EncoderDecoder(
        method.patch(module), encoder_decoder.LossConfig(**loss), method
    )


def variables(model):
    """Fresh variables of a T5X model."""
    shapes = {name: leaf.shape for name, leaf in BATCH.items()}
    kinds = {name: leaf.dtype for name, leaf in BATCH.items()}
    return jax.jit(lambda rng: model.get_initial_variables(rng, shapes, kinds))(jax.random.key(0))


def moved(params, method, by: float = 0.3):
    """The parameters with what the method trains changed by some noise."""
    flat = patching.flatten(params)
    noise = lambda path, leaf: jax.random.normal(jax.random.key(len(path)), leaf.shape)
    return patching.trees.unflatten(
        {p: x + by * noise(p, x) if method.is_trainable(p) else x for p, x in flat.items()}
    )
