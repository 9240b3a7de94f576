"""Task routers: which skills (modules) an example's task combines, in each split of the features.

All share one call: `router(site)` returns float32 weights [b, p, s], or [1, p, s] where every
example of a batch gets the same, whose last axis sums to one.
"""

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar
import zlib

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from moe_peft import errors
from moe_peft.routing import context, routers

SkillRouterFactory = Callable[..., "SkillRouter"]

LOGITS = "logits"
LOGITS_AXES = ("task", "split", "skill")
INIT_BOUND = 1e-3
EPSILON = 1e-12  # in the normalisation


class SkillRouter(routers.AnyRouter):
    """Base of all task routers."""

    num_skills: int  # modules to combine, at least 1
    # parts of the features with weights of their own (the heads of MHR), at least 1
    num_splits: int = 1

    def __post_init__(self) -> None:
        for name in ("num_skills", "num_splits", "num_tasks"):
            routers.check_positive(name, getattr(self, name, 1))
        super().__post_init__()

    @abc.abstractmethod
    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns the weights of the skills."""

    def _in_every_split(self, weights: Float[Array, "b s"]) -> Float[Array, "b p s"]:
        shape = (weights.shape[0], self.num_splits, self.num_skills)
        return jnp.broadcast_to(weights[:, None, :], shape)


class UniformSkillRouter(SkillRouter):
    """The same weight 1/S for every skill: Poly-mu and MHR-mu before their modules are merged."""

    option: ClassVar[str] = "uniform"
    why_not_merged: ClassVar[str | None] = None

    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns [1, p, s]."""
        shape = (1, self.num_splits, self.num_skills)
        return jnp.full(shape, 1.0 / self.num_skills, jnp.float32)


class TaskRouter(SkillRouter):
    """Learned allocation: `w = z / (sum_s z + 1e-12)`, `z = sigmoid(logits of the task)`.

    Poly (Ponti et al. 2022) and, with several splits, Poly-S / MHR (Caccia et al. 2023, section 3).
    With an rng "routing" and `relaxed`, `z = sigmoid(logits + log u - log(1 - u))`, u uniform and
    drawn for each example, split and skill: the Gumbel-sigmoid at temperature 1 of Poly and P1; the
    runs of MHR on T0 train without it. Logits start uniform within 1e-3 of zero.
    """

    option: ClassVar[str] = "learned"
    why_not_merged: ClassVar[str | None] = None
    is_learned: ClassVar[bool] = True

    num_tasks: int = 1  # rows of logits; with one row every example has it, whatever its task id
    relaxed: bool = True  # add the noise above in training
    # use z rounded to 0 or 1, with the gradient of z itself. The papers never round.
    straight_through: bool = False
    is_shared: bool = False  # the logits lie at the root of the model, see `patching.Granularity`

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns the weights of each example's task.

        Raises UserError without `RoutingContext.task_ids`, Int[b], if there are several tasks.
        """
        if self.is_shared:
            return site.shared_weights
        shape = self.logits_shape
        logits = partitioning.param_with_axes(
            LOGITS, init_logits, shape, jnp.float32, axes=LOGITS_AXES
        )
        rng = None
        if self.relaxed and site.has_rng:
            rng = self.routing_key("draws Gumbel noise")
        num_rows = None if site.router_input is None else site.router_input.shape[0]
        return self.weights(logits, site.context, rng, "/".join(self.path), num_rows)

    @property
    def logits_shape(self) -> tuple[int, int, int]:
        """(n, p, s)."""
        return self.num_tasks, self.num_splits, self.num_skills

    @staticmethod
    def published(shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
        """Logits [n, p, s] are [n, p s] there."""
        logits = {name: shape for name, shape in shapes.items() if name.endswith(LOGITS) and shape}
        return {name: (shape[0], -1) for name, shape in logits.items() if len(shape) == 3}

    def weights(
        self,
        logits: Float[Array, "n p s"],
        routing: context.RoutingContext,
        rng: Array | None = None,
        where: str = "the router",
        num_rows: int | None = None,
    ) -> Float[Array, "b p s"]:
        """Returns the weights that `logits` give; `__call__` without a module.

        Args:
            logits: one row per task.
            routing: gives the task of each example.
            rng: of the noise; None for none.
            where: for messages.
            num_rows: examples of the batch, where task ids are not needed but noise is.
        """
        if self.num_tasks > 1:
            z = logits[task_ids(routing, where)]
        elif rng is not None and self.relaxed and num_rows is not None:
            z = jnp.broadcast_to(logits, (num_rows, *logits.shape[1:]))
        else:
            z = logits
        if rng is not None and self.relaxed:
            tiny = jnp.finfo(jnp.float32).eps
            u = jax.random.uniform(rng, z.shape, jnp.float32, tiny, 1.0 - tiny)
            z = z + jnp.log(u) - jnp.log1p(-u)
        z = jax.nn.sigmoid(z)
        if self.straight_through:
            z = z + jax.lax.stop_gradient(jnp.round(z) - z)
        return z / (jnp.sum(z, axis=-1, keepdims=True) + EPSILON)


class RandomTaskRouter(SkillRouter):
    """Every task uses the same half of the skills for good, drawn once: Random-mu of P1.

    Nothing is learned or stored: the allocation is a function of `seed` and of the router's path
    (an own draw for each adapted layer; layers stacked by a scan share theirs).
    """

    option: ClassVar[str] = "random_task"
    why_not_merged: ClassVar[str | None] = None

    num_tasks: int = 1  # rows of the allocation
    seed: int = 0  # of the draw

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns 1 / ceil(S/2) for the skills of the example's task, 0 for others."""
        path = "/".join(self.path)
        table = jnp.asarray(self.allocation(path))
        return self._in_every_split(table[task_ids(site.context, path)])

    def allocation(self, path: str) -> Float[np.ndarray, "n s"]:
        """The weights of every task at `path`."""
        generator = np.random.default_rng([self.seed, zlib.crc32(path.encode())])
        draws = generator.random((self.num_tasks, self.num_skills))
        num_on = -(-self.num_skills // 2)
        is_on = np.argsort(np.argsort(draws, axis=1), axis=1) < num_on
        return (is_on / num_on).astype(np.float32)


class RandomExampleRouter(SkillRouter):
    """A fresh random subset of the skills for every example of every batch: Random-mu of P2.

    Each skill is on with probability 1/2, at least one is (the papers do not give the law); tasks
    do not matter. Without an rng "routing", that is in evaluation, all skills weigh 1/S.
    """

    option: ClassVar[str] = "random_example"
    why_not_merged: ClassVar[str | None] = (
        "draws skills for every example (average them first: variant mu)"
    )

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns equal weights for the skills that are on."""
        if not site.has_rng or site.router_input is None:
            return jnp.full((1, self.num_splits, self.num_skills), 1.0 / self.num_skills)
        shape = (site.router_input.shape[0], self.num_skills)
        u = jax.random.uniform(self.routing_key("draws skills at random"), shape)
        is_on = u <= jnp.maximum(0.5, jnp.min(u, axis=-1, keepdims=True))
        weights = is_on.astype(jnp.float32)
        return self._in_every_split(weights / jnp.sum(weights, axis=-1, keepdims=True))


class PrivateRouter(SkillRouter):
    """One skill per task, that of its own number: Private-mu of P1, and AdapterSoup's training."""

    option: ClassVar[str] = "private"
    why_not_merged: ClassVar[str | None] = None

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "b p s"]:
        """Returns one-hot weights. Raises UserError without task ids."""
        ids = task_ids(site.context, "/".join(self.path))
        return self._in_every_split(jax.nn.one_hot(ids, self.num_skills))

    @property
    def num_ids(self) -> int:
        """As many as skills."""
        return self.num_skills


def init_logits(
    key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> Array:
    """Draws fresh logits: uniform within 1e-3 of zero (released code of Poly and MHR)."""
    return jax.random.uniform(key, shape, dtype, -INIT_BOUND, INIT_BOUND)


def task_ids(routing: context.RoutingContext, where: str) -> Int[Array, "b"]:
    """The context's task ids; UserError without any."""
    if routing.task_ids is None:
        raise errors.UserError(
            f"{where} routes by task, but the batch has no feature 'task_ids' [batch]. Use a "
            "mixture whose tasks carry it, unpacked, or merge the adapter first (variant 'mu')."
        )
    return jnp.asarray(routing.task_ids)
