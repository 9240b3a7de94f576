"""Dense map, embedding, normalisation, feed-forward block and relative position bias of T5."""

from collections.abc import Callable
import functools
import math
import operator

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
import numpy as np

Tokens = Int[Array | np.ndarray, "b t"]
Initializer = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": nn.gelu,  # the tanh form, which transformers calls gelu_new
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "linear": lambda x: x,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.swish,
}


class Dense(nn.Module):
    """Linear map without bias over the trailing axes: `outputs = inputs @ kernel`.

    The kernel is drawn as a matrix [prod(inputs), prod(features)] and stored in `kernel_shape`, so
    that the 2-D form of T5X's `examples/t5` and the 3-D form of `examples/scalable_t5` hold the
    same numbers.
    """

    features: tuple[int, ...]  # output axes, for example (heads, head width)
    kernel_axes: tuple[str, ...]  # logical axis names of the stored kernel
    kernel_shape: tuple[int, ...]  # shape in which the kernel is stored
    kernel_init: Initializer  # initialiser of the kernel as a matrix
    dtype: DTypeLike  # in which the product is computed; the kernel is stored in float32
    num_input_axes: int = 1  # trailing axes of the inputs that are contracted

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns [..., *features] for inputs [..., *contracted axes]."""
        batch_shape = inputs.shape[: -self.num_input_axes]
        width = math.prod(inputs.shape[-self.num_input_axes :])
        matrix_shape = (width, math.prod(self.features))
        kernel = partitioning.param_with_axes(
            "kernel",
            lambda rng: self.kernel_init(rng, matrix_shape, jnp.float32).reshape(self.kernel_shape),
            axes=self.kernel_axes,
        )
        kernel = kernel.astype(self.dtype).reshape(matrix_shape)
        # One product of two matrices: with several token axes the kernel's gradient would contract
        # all of them at once, which XLA's CPU backend does many times slower.
        outputs = inputs.astype(self.dtype).reshape(-1, width) @ kernel
        return outputs.reshape(*batch_shape, *self.features)


class Embed(nn.Module):
    """Token embedding, and its transpose as output layer when the two are tied."""

    vocab_size: int
    emb_dim: int
    dtype: DTypeLike

    def setup(self) -> None:
        """Creates the table."""
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(stddev=1.0),
            (self.vocab_size, self.emb_dim),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, tokens: Tokens) -> Float[Array, "b t d"]:
        """Gathers rows (T5X multiplies by a one-hot matrix: same values, more work).

        An id beyond the vocabulary gives NaN, so that the loss shows it instead of hiding it.
        """
        return jnp.take(self.embedding, tokens, axis=0, mode="fill").astype(self.dtype)

    def attend(self, decoded: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Returns float32 logits: inner products with every row of the table."""
        rows = decoded.astype(jnp.float32).reshape(-1, self.emb_dim)
        logits = rows @ self.embedding.astype(jnp.float32).T
        return logits.reshape(*decoded.shape[:-1], self.vocab_size)


class LayerNorm(nn.Module):
    """Root-mean-square normalisation in float32: no mean, no bias."""

    dtype: DTypeLike
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns `x / rms(x) * scale` in `dtype`."""
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normalized = x * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normalized * scale.astype(jnp.float32)[None, None]).astype(self.dtype)


class Mlp(nn.Module):
    """Feed-forward block: the product of activated projections, projected back.

    One activation names its projection `wi` (T5 1.0), several `wi_0`, `wi_1` (T5 1.1).
    """

    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], deterministic: bool) -> Float[Array, "b t d"]:
        """Returns `wo(prod_i activation_i(wi_i(x)))`."""
        emb_dim = x.shape[-1]
        dense = functools.partial(
            Dense,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            dtype=self.dtype,
        )
        branches = []
        for i, activation in enumerate(self.activations):
            wi = dense(
                features=(self.mlp_dim,),
                kernel_axes=("embed", "mlp"),
                kernel_shape=(emb_dim, self.mlp_dim),
                name="wi" if len(self.activations) == 1 else f"wi_{i}",
            )
            branches.append(ACTIVATIONS[activation](wi(x)))
        hidden = functools.reduce(operator.mul, branches)
        hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic)
        hidden = partitioning.with_sharding_constraint(hidden, ("batch", "length", "mlp"))
        return dense(
            features=(emb_dim,),
            kernel_axes=("mlp", "embed"),
            kernel_shape=(self.mlp_dim, emb_dim),
            name="wo",
        )(hidden)


def relative_position_buckets(
    distances: Int[np.ndarray, "n"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "n"]:
    """Returns the bucket of each distance `key position - query position`.

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `max_distance` and share everything beyond it (T5, section 2.1). A decoder never looks ahead:
    there all positive distances share bucket 0.
    """
    num_buckets = num_buckets // 2 if bidirectional else num_buckets
    offsets = np.where(distances > 0, num_buckets, 0) if bidirectional else 0
    steps = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    num_exact = num_buckets // 2
    growth = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(num_exact))
    # T5X adds an epsilon to the growth. It moves no distance below three million.
    # In float32 as transformers: where a bucket begins at a whole distance, rounding decides.
    fraction = growth / np.float32(np.log(max_distance / num_exact))
    logarithmic = num_exact + (fraction * (num_buckets - num_exact)).astype(np.int32)
    buckets = np.where(steps < num_exact, steps, np.minimum(logarithmic, num_buckets - 1))
    return (buckets + offsets).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Learned attention bias per head and distance bucket."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "h m"]:
        """Returns one float32 bias per head and distance; column `distance % m`, m = 2 * length."""
        rel_embedding = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        distances = np.concatenate([np.arange(length), np.arange(-length, 0)])
        buckets = relative_position_buckets(
            distances, self.bidirectional, self.num_buckets, self.max_distance
        )
        return rel_embedding.astype(jnp.float32)[:, buckets]


def expand_distances(by_distance: Float[Array, "h m"]) -> Float[Array, "1 h t t"]:
    """Spreads biases by distance over all pairs of query and key.

    Row q is the same list of distances shifted by q. Repeating the list of 2t and cutting it into
    rows of 2t - 1 shifts each row by one more: a copy forward and a plain sum backward, instead of
    a gather of t * t entries per head and its scatter.
    """
    heads, double = by_distance.shape
    length = double // 2
    repeated = jnp.broadcast_to(by_distance[:, None], (heads, length, double))
    flat = repeated.reshape(heads, -1)[:, : length * (double - 1)]
    return flat.reshape(1, heads, length, double - 1)[..., :length]


def select_distances(
    by_distance: Float[Array, "h m"], query_positions: Int[Array, "q"]
) -> Float[Array, "1 h q t"]:
    """Returns the rows of `expand_distances` at `query_positions`, which may be traced."""
    double = by_distance.shape[1]
    distances = jnp.arange(double // 2)[None, :] - query_positions[:, None]
    return by_distance[:, distances % double][None]
