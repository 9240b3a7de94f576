"""Thin products: values and gradients against plain ones, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import narrow_matmul

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("width", "features"), [(16, 3), (3, 16), (4, 4)])
@pytest.mark.parametrize("tokens", [(), (6,), (2, 3), (2, 3, 2)])
def test_equals_plain_product(tokens, width, features):
    x, kernel, cotangent = (
        normal(*tokens, width),
        normal(width, features),
        normal(*tokens, features),
    )
    outputs, pullback = jax.vjp(narrow_matmul.narrow_matmul, x, kernel)
    expected, expected_pullback = jax.vjp(jnp.dot, x, kernel)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        assert grad.shape == wanted.shape
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


def test_wide_parameters_beside_narrow_activations():
    x, kernel = normal(64, 16).astype(jnp.bfloat16), normal(16, 3)
    outputs, pullback = jax.vjp(narrow_matmul.narrow_matmul, x, kernel)
    assert outputs.dtype == jnp.bfloat16
    cotangent = normal(64, 3).astype(jnp.bfloat16)
    x_bar, kernel_bar = pullback(cotangent)
    assert (x_bar.dtype, kernel_bar.dtype) == (jnp.bfloat16, jnp.float32)
    # Summed in float32: exact up to float32 rounding, where bfloat16 would keep 8 bits.
    exact = np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64)
    np.testing.assert_allclose(kernel_bar, exact, rtol=1e-4, atol=1e-5)


def test_vmap_and_scan():
    x, kernels = normal(5, 4, 16), normal(5, 16, 3)
    grad = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(narrow_matmul.narrow_matmul(x, kernel))))
    expected = jnp.stack([grad(kernel, row) for kernel, row in zip(kernels, x, strict=True)])
    np.testing.assert_allclose(jax.vmap(grad)(kernels, x), expected, rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda c, row: (c, grad(*row)), 0, (kernels, x))
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)


def test_the_wide_factor_is_not_transposed():
    """What the rule is for; should XLA stop needing it, this test says so by failing."""
    x, kernel = normal(64, 512), normal(512, 3)

    def wide_transposes(product):
        gradient = jax.grad(lambda kernel: jnp.sum(jnp.sin(product(x, kernel))))
        text = jax.jit(gradient).lower(kernel).compile().as_text()
        dots = [line for line in text.splitlines() if " dot(" in line]
        return sum(
            "f32[512,3]" in line.split(" dot(")[0] and "contracting_dims={0}" in line
            for line in dots
        )

    assert wide_transposes(jnp.dot) == 1
    assert wide_transposes(narrow_matmul.narrow_matmul) == 0
