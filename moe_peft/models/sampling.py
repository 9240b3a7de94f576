"""Which ids may be drawn: the best few, or those that hold most of the probability."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "n v"]


def restrict(logits: Logits, *, top_k: int | None = None, top_p: float = 1.0) -> Logits:
    """Sets logits outside the k best, then outside the mass p, to -inf; equals of the last stay."""
    logits = logits.astype(jnp.float32)
    if top_k is not None and top_k < logits.shape[-1]:
        kth_best = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth_best, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        # The best id has no mass before it, so at least one stays.
        last_kept = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    return logits
