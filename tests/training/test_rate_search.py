"""Learning rates that are tried: the best of those that train, and one line where none does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.training import optimizers, rate_search


class Parabola:
    """The loss (w - 1)^2, or NaN."""

    def __init__(self, scale):
        self._scale = scale

    def loss_sums(self, params, batch, rng):
        """Takes no dropout and sees a part of the rows."""
        assert rng is None
        distance = (params["adapter"]["w"] - 1.0) ** 2
        return self._scale * jnp.sum(distance), jnp.float32(1), {}


def find(scale):
    batches = itertools.repeat({"rows": np.zeros((10, 2), np.int32)})
    optimizer = optimizers.adamw(1e-2)
    trainable = {"adapter": {"w": jnp.zeros(())}}
    what = (Parabola(scale), methods.ia3(), optimizer, 100, {}, trainable, batches)
    return rate_search.find(*what)


def test_the_rate_that_comes_nearest_is_taken():
    """40 steps of Adam at rate r go at most about 40 r, so that 0.1 is at 1 first."""
    found = find(1.0)
    assert found.factor == 10.0
    assert found.rates == pytest.approx([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    assert np.argmin(found.losses) == 4
    assert "learning rate 0.1 has the lowest loss" in found.text


def test_no_loss_is_invented_where_none_is_finite():
    with pytest.raises(errors.UserError, match="from 0.001 to 0.1 trains: every loss is NaN"):
        find(jnp.nan)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(errors.UserError, match="works in one process"):
        find(1.0)
