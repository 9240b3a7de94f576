"""Learning rates as functions of the step, which counts from 0 at the first update."""

from collections.abc import Callable

import gin
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_peft import errors

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def _check_steps(name: str, warmup_steps: int, total_steps: int) -> None:
    if not 0 <= warmup_steps <= total_steps or total_steps < 1:
        raise errors.UserError(
            f"schedules.{name} expects 0 <= warmup_steps <= total_steps and at least one step, "
            f"got warmup_steps={warmup_steps}, total_steps={total_steps}."
        )


@gin.register(module="schedules")
def constant(value: float) -> Schedule:
    """Returns s -> value."""
    return lambda step: jnp.asarray(value, jnp.float32)


@gin.register(module="schedules")
def linear_warmup_linear_decay(
    peak: float,
    total_steps: int,
    warmup_steps: int | None = None,
    warmup_fraction: float = 0.06,
    first_update_is_zero: bool = True,
) -> Schedule:
    """Returns the schedule of the Poly and MHR runs: up from 0 to `peak`, then down to 0.

    s / warmup before the end of the warm-up, (total - s) / (total - warmup) after it, times peak.

    Args:
      peak: the highest learning rate.
      total_steps: where the rate is 0 again; it stays there.
      warmup_steps: steps of the warm-up; None takes int(warmup_fraction * total_steps).
      warmup_fraction: of the total; the papers' code uses 0.06.
      first_update_is_zero: as released, the first update has s = 0 and so changes nothing. False
        shifts by one step: the first update has s = 1.
    """
    warmup = int(warmup_fraction * total_steps) if warmup_steps is None else warmup_steps
    _check_steps("linear_warmup_linear_decay", warmup, total_steps)
    shift = 0 if first_update_is_zero else 1

    def schedule(step):
        position = jnp.asarray(step + shift, jnp.float32)
        up = position / max(warmup, 1)
        down = (total_steps - position) / max(total_steps - warmup, 1)
        return peak * jnp.where(position < warmup, up, jnp.maximum(down, 0.0))

    return schedule


@gin.register(module="schedules")
def rsqrt(base: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """Returns s -> base / sqrt(max(s, warmup_steps)), as T5 was pre-trained (base 1)."""
    errors.check_at_least("schedules.rsqrt.warmup_steps", warmup_steps, 1)
    return lambda step: base / jnp.sqrt(jnp.maximum(jnp.asarray(step, jnp.float32), warmup_steps))


@gin.register(module="schedules")
def linear_warmup_cosine(
    peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> Schedule:
    """Returns a linear rise from peak / warmup_steps, then a half cosine from `peak` to `final`.

    The first update has (1 / warmup_steps) * peak, update number warmup_steps has peak, and update
    number total_steps has final, where the rate stays.
    """
    _check_steps("linear_warmup_cosine", warmup_steps, total_steps)

    def schedule(step):
        position = jnp.asarray(step + 1, jnp.float32)
        up = position / max(warmup_steps, 1)
        done = (position - warmup_steps) / max(total_steps - warmup_steps, 1)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
        return jnp.where(position < warmup_steps, peak * up, final + (peak - final) * cosine)

    return schedule
