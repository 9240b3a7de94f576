"""The numbers of (IA)3 and of mixtures of vectors: pure functions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_peft import narrow_matmul


def mix_vectors(
    weights: Float[Array, "... e"], vectors: Float[Array, "e *features"], num_token_axes: int
) -> Float[Array, "..."]:
    """Returns `sum_e weights_e l_e`: [tokens..., *features].

    Args:
        weights: [tokens..., e], or [tokens..., h, e] with a decision per head (first feature).
        vectors: l, one set per expert.
        num_token_axes: tells the two apart.
    """
    if weights.ndim == num_token_axes + 1:
        mixed = narrow_matmul.narrow_matmul(weights, vectors.reshape(vectors.shape[0], -1))
        return mixed.reshape(*weights.shape[:-1], *vectors.shape[1:])
    return jnp.einsum("...he,ehk->...hk", weights, vectors)


def scale_features(x: Float[Array, "..."], vectors: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * vectors in the dtype of x, multiplied in float32.

    Scales start at one, where bfloat16 resolves 0.4 %: rounding them first would hide training.
    """
    return (x.astype(jnp.float32) * vectors).astype(x.dtype)
