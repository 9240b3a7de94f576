"""Relative positions, embedding and normalisation of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft.models import attention, layers


def bucket_by_definition(distance, bidirectional, num_buckets, max_distance):
    """The bucket of one distance, with exact arithmetic instead of float32 logarithms."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        steps = abs(distance)
    else:
        steps = max(-distance, 0)
    num_exact = num_buckets // 2
    if steps < num_exact:
        return offset + steps
    # Logarithmic bucket i begins at num_exact * (max_distance / num_exact) ** (i / num_exact), so
    # steps are in it when (steps / num_exact) ** num_exact >= (max_distance / num_exact) ** i, in
    # integers:
    bucket = 0
    while bucket + 1 < num_exact and (
        steps**num_exact * num_exact ** (bucket + 1)
        >= max_distance ** (bucket + 1) * num_exact**num_exact
    ):
        bucket += 1
    return offset + num_exact + bucket


@pytest.mark.parametrize("bidirectional", [True, False])
# T5's, Ankh's, and some where buckets begin at whole distances: 80 in the decoder of (128, 100).
@pytest.mark.parametrize("sizes", [(32, 128), (64, 128), (64, 256), (128, 100), (8, 20)])
def test_buckets(bidirectional, sizes):
    distances = np.arange(-600, 600)
    buckets = layers.relative_position_buckets(distances, bidirectional, *sizes)
    expected = [bucket_by_definition(int(d), bidirectional, *sizes) for d in distances]
    np.testing.assert_array_equal(buckets, expected)
    # A decoder's future shares bucket 0; distance 0 to the right of nothing leaves one unused.
    if sizes[1] == 128:
        assert len(set(buckets.tolist())) == sizes[0] - bidirectional


def test_expanded_distances_are_a_lookup():
    length, heads = 7, 3
    by_distance = jax.random.normal(jax.random.key(0), (heads, 2 * length))
    distances = np.arange(length)[None, :] - np.arange(length)[:, None]
    lookup = lambda x: x[:, distances % (2 * length)][None]
    np.testing.assert_array_equal(layers.expand_distances(by_distance), lookup(by_distance))

    weights = jax.random.normal(jax.random.key(1), (1, heads, length, length))
    gradient = lambda f: jax.grad(lambda x: jnp.sum(f(x) * weights))(by_distance)
    np.testing.assert_allclose(gradient(layers.expand_distances), gradient(lookup), rtol=1e-5)

    rows = layers.select_distances(by_distance, jnp.array([2, 5]))
    np.testing.assert_array_equal(rows, lookup(by_distance)[:, :, [2, 5]])


def test_ids_beyond_the_vocabulary_are_not_hidden():
    embed = layers.Embed(vocab_size=4, emb_dim=3, dtype="float32")
    variables = embed.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    embedded = embed.apply(variables, jnp.array([[3, 4]]))
    assert np.isfinite(embedded[0, 0]).all()
    assert np.isnan(embedded[0, 1]).all()


def test_norm_is_computed_in_float32():
    x = 1e4 * jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
    norm = layers.LayerNorm("bfloat16")
    y = norm.apply(norm.init(jax.random.key(1), x), x)
    assert y.dtype == jnp.bfloat16
    x = np.asarray(x, np.float64)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 3, 4))
    mask = jnp.array([[True, False], [False, False]])[None, None]
    out = attention.dot_product_attention(q, k, v, mask, None)
    np.testing.assert_allclose(out[0, 0], v[0, 0], rtol=1e-6)
    np.testing.assert_allclose(out[0, 1], v[0].mean(axis=0), rtol=1e-5)


def test_float32_logits_lose_nothing_in_the_product():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 64), jnp.bfloat16) * 3
    exact = attention.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), None, None)
    error = {
        float32_logits: jnp.abs(
            attention.dot_product_attention(q, k, v, None, None, float32_logits=float32_logits)
            - exact
        ).mean()
        for float32_logits in (False, True)
    }
    assert error[True] < 0.5 * error[False]
