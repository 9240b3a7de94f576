"""The rank-space form against the paper's listing and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters

SCALE = 0.5
TOKENS, IN, OUT, RANK = (2, 3), 5, 7, 2


def make(num_experts, dtype=np.float32, weight_shape=TOKENS):
    rng = np.random.default_rng(num_experts)
    x = rng.normal(size=(*TOKENS, IN))
    lora_a = rng.normal(size=(IN, num_experts, RANK))
    lora_b = rng.normal(size=(num_experts, RANK, OUT))
    weights = rng.dirichlet(np.ones(num_experts), size=weight_shape)
    return [jnp.asarray(a, dtype) for a in (x, lora_a, lora_b)] + [jnp.asarray(weights, np.float32)]


def oracle(x, lora_a, lora_b, weights):
    x, lora_a, lora_b, weights = (np.asarray(a, np.float64) for a in (x, lora_a, lora_b, weights))
    delta = np.zeros((*TOKENS, OUT))
    for b, t in np.ndindex(*TOKENS):
        for e in range(lora_a.shape[1]):
            w = weights[b, min(t, weights.shape[1] - 1), e]
            delta[b, t] += w * (x[b, t] @ lora_a[:, e] @ lora_b[e])
    return SCALE * delta


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("weight_shape", [TOKENS, (2, 1)], ids=["token", "sentence"])
def test_equals_numpy(num_experts, weight_shape):
    x, lora_a, lora_b, weights = make(num_experts, weight_shape=weight_shape)
    delta = adapters.low_rank_delta(x, lora_a, lora_b, SCALE, weights)
    # float32 sums of 15 products of order one.
    np.testing.assert_allclose(delta, oracle(x, lora_a, lora_b, weights), rtol=1e-5, atol=1e-5)


def test_without_weights_every_expert_counts_once():
    x, lora_a, lora_b, _ = make(3)
    delta = adapters.low_rank_delta(x, lora_a, lora_b, SCALE)
    expected = oracle(x, lora_a, lora_b, np.ones((*TOKENS, 3)))
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_equals_listing_in_value_and_gradient(num_experts):
    args = make(num_experts)
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=(*TOKENS, OUT)), jnp.float32)

    def objective(function):
        return lambda x, a, b, w: jnp.vdot(cotangent, function(x, a, b, SCALE, w))

    results = [
        jax.jit(jax.value_and_grad(objective(f), argnums=(0, 1, 2, 3)))(*args)
        for f in (adapters.low_rank_delta, adapters.molora_listing)
    ]
    (value, grads), (expected_value, expected_grads) = results
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert len(grads) == 4
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_stays_in_bfloat16():
    x, lora_a, lora_b, weights = make(3, jnp.bfloat16)
    delta = adapters.low_rank_delta(x, lora_a, lora_b, SCALE, weights)
    assert delta.dtype == jnp.bfloat16
    expected = oracle(x, lora_a, lora_b, weights)
    # bfloat16 keeps 8 bits; values are of order one.
    np.testing.assert_allclose(np.asarray(delta, np.float32), expected, atol=0.06)


def test_permuted_experts_give_the_same():
    x, lora_a, lora_b, weights = make(3)
    order = np.array([2, 0, 1])
    expected = adapters.low_rank_delta(x, lora_a, lora_b, SCALE, weights)
    permuted = adapters.low_rank_delta(
        x, lora_a[:, order], lora_b[order], SCALE, weights[..., order]
    )
    np.testing.assert_allclose(permuted, expected, rtol=1e-5, atol=1e-6)
