"""Weights of other implementations as our parameter trees, for the tests of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import patching
from moe_peft.weights import leaves, scan_layout, t5_names


@pytest.fixture
def from_transformers():
    """A function from {name in transformers: array} to our unscanned tree.

    Linear maps are transposed, so that gradients are converted the same way.
    """

    def convert(weights):
        flat = {t5_names.path_of(name): values for name, values in weights.items()}
        return patching.trees.unflatten(
            {p: jnp.asarray(v.T if t5_names.is_transposed(p) else v) for p, v in flat.items()}
        )

    return convert


@pytest.fixture
def to_scanned():
    """A function from an unscanned tree to the scanned one of the same network."""

    def convert(params):
        found = leaves.flatten(jax.tree.map(np.asarray, params))  # numpy: nothing to compile
        return jax.tree.map(jnp.asarray, leaves.load(scan_layout.convert(found, scanned=True)))

    return convert
