"""Losses on routing decisions, and how they are collected from a whole model.

Each router that sees more than one expert sows both losses, unweighted, in the collection
`COLLECTION` when the caller made it mutable. A model that loops over its layers (`nn.scan`) has to
lift that collection, or they are lost.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

COLLECTION = "router_losses"
LOAD_BALANCING = "load_balancing"
Z = "z"


def _masked_mean(values: Float[Array, "..."], mask: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mean of values [n, ...] over the first axis where mask [n] is 1; 0 if it is nowhere."""
    total = jnp.tensordot(mask, values, axes=1)
    return total / jnp.maximum(jnp.sum(mask), 1.0)


def load_balancing(
    probs: Float[Array, "n e"], selected: Float[Array, "n e"], mask: Float[Array, "n"]
) -> Float[Array, ""]:
    """Returns `E * sum_e f_e * P_e`: 1 when balanced, up to E when one expert gets everything.

    Switch Transformers (Fedus et al. 2021), section 2.2. Paper and code of MoV name such a loss and
    train without it.

    Args:
        probs: softmax over all experts; P_e is its mean.
        selected: f_e is the mean of this: 1/k for each of the k experts a decision uses; under soft
            merging 1 for the most probable expert.
        mask: 1 for decisions that count, 0 for padding.
    """
    # Which experts are selected is piecewise constant: no gradient comes through the fractions.
    fraction = _masked_mean(selected, mask)
    return probs.shape[-1] * jnp.sum(fraction * _masked_mean(probs, mask))


def router_z(logits: Float[Array, "n e"], mask: Float[Array, "n"]) -> Float[Array, ""]:
    """Returns the mean of `logsumexp(logits)^2`, which keeps logits small (ST-MoE, section 3.3)."""
    return _masked_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)


def means(collection: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """Returns {"load_balancing": ..., "z": ...}: means over all routers of the model.

    Layers stacked by a scan count one by one. Empty if nothing was sowed.
    """
    values: dict[str, list] = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(collection)).items():
        values.setdefault(path[-1], []).append(jnp.ravel(leaf))
    return {name: jnp.mean(jnp.concatenate(leaves)) for name, leaves in sorted(values.items())}


def total(
    collection: Mapping[str, Any], load_balancing_weight: float = 0.0, z_weight: float = 0.0
) -> Float[Array, ""]:
    """Returns the weighted sum of `means`: what is added to the objective.

    Means over routers, so that a weight means the same at every depth.
    """
    found = means(collection)
    weights = {LOAD_BALANCING: load_balancing_weight, Z: z_weight}
    return sum((weights[name] * value for name, value in found.items()), jnp.zeros((), jnp.float32))
