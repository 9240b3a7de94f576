"""Multi-head attention of T5, with caches for decoding."""

import functools

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moe_peft.models import layers

MASKED = -1e10


def dot_product_attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h k"],
    mask: Bool[Array, "..."] | None,
    bias: Float[Array, "1 h q t"] | None,
    *,
    float32_logits: bool = False,
) -> Float[Array, "b q h k"]:
    """Returns `softmax(query key + bias) value`, the softmax in float32.

    T5 has no 1/sqrt(k) here: it sits in the initialiser of the query kernel. A query whose keys are
    all masked attends to everything equally, so its output is finite and means nothing.

    Args:
        mask: true where a query may see a key; broadcasts to [b, h, q, t].
        bias: float32, added to the attention logits.
        float32_logits: accumulate and keep the products in float32 when activations are bfloat16.
    """
    # Heads first, once: left to themselves both products and both of their gradients transpose
    # (a third more time on a CPU).
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    product_dtype = jnp.float32 if float32_logits else query.dtype
    logits = jnp.einsum("bhqk,bhtk->bhqt", query, key, preferred_element_type=product_dtype)
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bhqt,bhtk->bhqk", weights, value), 1, 2)


class Attention(nn.Module):
    """Projects to heads, attends, and projects back.

    While decoding, self-attention (`decode="self"`) keeps keys and values of past tokens in the
    collection "cache", as T5X does: the first call makes the empty cache, each later one appends
    its tokens. Attention to the encoder (`decode="cross"`) uses the collection "cross_cache" when
    it is given or mutable: keys and values of the encoded text are then computed once instead of at
    every token. Without that collection they are recomputed, as in T5X.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float
    dtype: DTypeLike
    float32_logits: bool
    # store kernels as (embed, heads, kv) like T5X's `scalable_t5`, not as matrices
    kernel_is_3d: bool
    decode: str = "none"  # "none", "self" or "cross"
    # tokens in the cache; the length of the first call's inputs if None
    max_decode_length: int | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "b q d"],
        inputs_kv: Float[Array, "b t d"],
        mask: Bool[Array, "..."] | None,
        bias: Float[Array, "..."] | None,
        deterministic: bool,
    ) -> Float[Array, "b q d"]:
        """Attends from `inputs_q` to `inputs_kv`.

        Args:
            mask: broadcasts to [b, h, q, t]; true where a query may see a key.
            bias: [1, h, q, t]; while decoding biases by distance [h, 2 * cache length], from which
                the rows of the current tokens are taken.
            deterministic: no dropout.
        """
        emb_dim, inner = inputs_q.shape[-1], (self.num_heads, self.head_dim)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        query_init = lambda *args: init(*args) * self.head_dim**-0.5
        joined = self.num_heads * self.head_dim
        projection = functools.partial(
            layers.Dense,
            features=inner,
            kernel_axes=("embed", "heads", "kv") if self.kernel_is_3d else ("embed", "joined_kv"),
            kernel_shape=(emb_dim, *inner) if self.kernel_is_3d else (emb_dim, joined),
            dtype=self.dtype,
        )
        query = _by_head(projection(kernel_init=query_init, name="query")(inputs_q))
        key_value = lambda: tuple(
            _by_head(projection(kernel_init=init, name=name)(inputs_kv))
            for name in ("key", "value")
        )
        if self.decode == "cross":
            key, value = self._encoded(key_value)
        else:
            key, value = key_value()
        if self.decode == "self":
            key, value, mask, bias = self._append(key, value, bias)
        # T5 drops a key for all queries at once, which is the same as dropping its value: the
        # weights [b, h, q, t] need not be touched.
        value = nn.Dropout(self.dropout_rate, broadcast_dims=(-1,))(value, deterministic)
        attended = dot_product_attention(
            query, key, value, mask, bias, float32_logits=self.float32_logits
        )
        return layers.Dense(
            features=(emb_dim,),
            kernel_axes=("heads", "kv", "embed") if self.kernel_is_3d else ("joined_kv", "embed"),
            kernel_shape=(*inner, emb_dim) if self.kernel_is_3d else (joined, emb_dim),
            kernel_init=init,
            dtype=self.dtype,
            num_input_axes=2,
            name="out",
        )(attended)

    def _encoded(self, key_value):
        """Returns keys and values of the encoded text, from "cross_cache" where it has them."""
        if self.has_variable("cross_cache", "key"):
            names = ("key", "value")
            return tuple(self.get_variable("cross_cache", name) for name in names)
        key, value = key_value()
        if self.is_mutable_collection("cross_cache"):
            self.put_variable("cross_cache", "key", key)
            self.put_variable("cross_cache", "value", value)
        return key, value

    def _append(self, key, value, bias):
        """Adds the current tokens to the cache; returns all keys and values, mask and bias."""
        batch, num_new, *inner = key.shape
        is_initialized = self.has_variable("cache", "cached_key")
        length = self.max_decode_length or num_new
        shape = (batch, length, *inner)
        cached_key = self.variable("cache", "cached_key", jnp.zeros, shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, shape, value.dtype)
        cache_index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
        if not is_initialized:
            return key, value, None, None
        if cached_key.value.shape != shape and self.max_decode_length:
            raise ValueError(
                f"The decoding cache has shape {cached_key.value.shape}; with max_decode_length="
                f"{length} and a batch of {batch} it should be {shape}. Make a new cache."
            )
        index = cache_index.value
        start = (0, index, 0, 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key, start)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value, start)
        cache_index.value = index + num_new
        query_positions = index + jnp.arange(num_new)
        key_positions = jnp.arange(cached_key.value.shape[1])
        mask = key_positions[None, None, None, :] <= query_positions[None, None, :, None]
        bias = layers.select_distances(bias, query_positions)
        return cached_key.value, cached_value.value, mask, bias


def _by_head(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    return partitioning.with_sharding_constraint(x, ("batch", "length", "heads", "kv"))
