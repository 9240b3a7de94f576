"""Floating-point operations of a training run, by count: no measurement, no compiler.

Counted are the products with the network's weights and attention's two products, two operations
for each multiply-add, over full rows of padded tokens. Not counted are adapters, norms, softmax,
the optimiser, and what rematerialisation computes twice; together they are a few per cent, or a
third more with full rematerialisation.
"""

import copy

import gin

from moe_peft.models import family


def forward(config: family.Config, inputs: int, targets: int) -> float:
    """Operations of one pass over one row of so many tokens."""
    return family.of(config).operations(config, inputs, targets)


def training(
    config: family.Config, rows: int, inputs: int, targets: int, *, is_full: bool = False
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
    config = gin.query_parameter("%MODEL").scoped_configurable_fn().config
    return training(config, rows, lengths["inputs"], lengths["targets"], is_full=is_full)
