"""A learning rate found by trying: a few short trainings as one mapped program."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import optax

from moe_peft import errors, methods, patching
from moe_peft.training import optimizers

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_STEPS = 40  # of each training
_JUDGED = 10  # last steps, whose mean loss counts, each before the model learns from its batch


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    factor: float  # of the rates that were given
    rates: tuple[float, ...]  # that were tried
    losses: tuple[float, ...]  # at the end, by rate; NaN where it diverged

    @property
    def text(self) -> str:
        """One line for people."""
        pairs = zip(self.rates, self.losses, strict=True)
        tried = ", ".join(f"{rate:g}: {loss:.4g}" for rate, loss in pairs)
        best = self.rates[int(np.nanargmin(self.losses))]
        return f"learning rate {best:g} has the lowest loss after {_STEPS} steps ({tried})"


def find(
    model: Any,
    method: methods.Method,
    optimizer: optimizers.Optimizer,
    num_steps: int,
    frozen: PyTree,
    trainable: PyTree,
    batches: Iterator[Mapping[str, np.ndarray]],
    factors: Sequence[float] = FACTORS,
) -> Found:
    """Trains with each factor times the optimiser's highest rate, held constant.

    Each training sees a part of every batch, so that all together need the memory of one run.
    Starts from `trainable` and leaves it as it is; draws no dropout, so that rates alone differ.
    """
    if jax.process_count() > 1:
        raise errors.UserError(
            "--learning_rate auto works in one process. Find the rate there, and give it by number."
        )
    peak = optimizer.peak(num_steps)
    some = list(itertools.islice(batches, _STEPS))
    rows = max(len(next(iter(some[0].values()))) // len(factors), 1)
    stacked = {name: np.stack([batch[name][:rows] for batch in some]) for name in some[0]}

    def train(factor, trainable, frozen, stacked):
        scaled = dataclasses.replace(optimizer, learning_rate=lambda step: factor * peak)
        transform = scaled.build(trainable, method.learning_rate_group)
        run = _run(model, transform, frozen)
        return jax.lax.scan(run, (trainable, transform.init(trainable)), stacked)[1]

    losses = jax.jit(jax.vmap(train, in_axes=(0, None, None, None)))(
        jnp.asarray(factors), trainable, frozen, stacked
    )
    ends = np.asarray(losses)[:, -_JUDGED:].mean(axis=1)
    if np.isnan(ends).all():
        raise errors.UserError(
            f"None of the learning rates from {peak * min(factors):g} to {peak * max(factors):g} "
            "trains: every loss is NaN. Give a lower one, or DTYPE='float32'."
        )
    best = float(factors[int(np.nanargmin(ends))])
    return Found(best, tuple(peak * f for f in factors), tuple(map(float, ends)))


def _run(model: Any, transform: optax.GradientTransformation, frozen: PyTree) -> Callable:
    """One step, for `jax.lax.scan`: (trainable, optimiser's state), batch -> the same, loss."""

    def loss(trainable, batch):
        total, normalizer, _ = model.loss_sums(patching.merge(frozen, trainable), batch, None)
        return total / jnp.maximum(normalizer, 1e-9)

    def step(carry, batch):
        trainable, state = carry
        value, grads = jax.value_and_grad(loss)(trainable, batch)
        updates, state = transform.update(grads, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    return step
