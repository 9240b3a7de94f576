"""The numbers of LoRA and of mixtures of LoRAs: pure functions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_peft import narrow_matmul


def low_rank_delta(
    x: Float[Array, "... i"],
    lora_a: Float[Array, "i e r"],
    lora_b: Float[Array, "e r o"],
    scale: float,
    weights: Float[Array, "... e"] | None = None,
) -> Float[Array, "... o"]:
    """Returns `scale * sum_e weights_e (x A_e) B_e`, mixed in rank space.

    The experts' outputs [..., e, o] never exist: the weights multiply the rank-space activations
    [..., e, r], and one product contracts expert and rank together. Equal to `molora_listing`.

    Args:
        x: inputs of the frozen layer.
        lora_a: down-projections, in the dtype of x or in float32.
        lora_b: up-projections, in the same.
        scale: alpha / rank.
        weights: of the experts; leading axes broadcast against those of x. None weighs each by 1.
    """
    return expand(narrow_matmul.narrow_matmul(x, joined(lora_a)), lora_b, scale, weights)


def joined(lora_a: Float[Array, "i e r"]) -> Float[Array, "i er"]:
    """Returns the down-projections of all experts side by side."""
    return lora_a.reshape(lora_a.shape[0], -1)


def expand(
    hidden: Float[Array, "... er"],
    lora_b: Float[Array, "e r o"],
    scale: float,
    weights: Float[Array, "... e"] | None,
) -> Float[Array, "... o"]:
    """Returns the second half of `low_rank_delta`: from rank space to the outputs."""
    experts, rank, _ = lora_b.shape
    if weights is not None:
        hidden = hidden.reshape(*hidden.shape[:-1], experts, rank)
        hidden = hidden * (weights * scale).astype(hidden.dtype)[..., None]
        hidden = hidden.reshape(*hidden.shape[:-2], experts * rank)
    else:
        hidden = hidden * jnp.asarray(scale, hidden.dtype)
    return narrow_matmul.narrow_matmul(hidden, lora_b.reshape(experts * rank, -1))


def molora_listing(
    x: Float[Array, "... i"],
    lora_a: Float[Array, "i e r"],
    lora_b: Float[Array, "e r o"],
    scale: float,
    weights: Float[Array, "... e"],
) -> Float[Array, "... o"]:
    """Returns the same as `low_rank_delta`, computed as MoLoRA's appendix A.5 lists it.

    Forms every expert's whole output, then mixes: the reference for tests and benchmarks.
    """
    hidden = jnp.einsum("...i,ier->...er", x, lora_a)
    outputs = jnp.einsum("...er,ero->...eo", hidden, lora_b)
    return scale * jnp.einsum("...e,...eo->...o", weights.astype(outputs.dtype), outputs)
