"""Floating-point operations of a training run, by count: no measurement, no compiler.

Counted are the products with the network's weights and attention's two products, two operations
for each multiply-add, over full rows of padded tokens. Not counted are adapters, norms, softmax,
the optimiser, and what rematerialisation computes twice; together they are a few per cent, or a
third more with full rematerialisation.
"""

import copy

import gin

from moe_peft.models import t5


def forward(config: t5.T5Config, inputs: int, targets: int) -> float:
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


def training(
    config: t5.T5Config, rows: int, inputs: int, targets: int, *, is_full: bool = False
) -> float:
    """Operations of training on so many rows.

    The backward pass through a frozen network costs as much as the forward pass, and twice as much
    where all weights learn (`is_full`).
    """
    return rows * (3 if is_full else 2) * forward(config, inputs, targets)


def of_settings(*, is_full: bool) -> float:
    """Operations of `train` with the gin settings that are in force."""
    # A copy has values where macros refer to others.
    lengths = copy.deepcopy(gin.query_parameter("%FEATURE_LENGTHS"))
    rows = gin.query_parameter("%BATCH_SIZE") * gin.query_parameter("%TRAIN_STEPS")
    config = gin.get_configurable("T5Config")()
    return training(config, rows, lengths["inputs"], lengths["targets"], is_full=is_full)
