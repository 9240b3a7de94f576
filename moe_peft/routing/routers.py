"""Routers: linen modules that weigh the experts for each decision.

All share one call: `router(site)` returns float32 weights [..., e], whose leading axes broadcast
against those of the activations (token axes, and perhaps heads).
"""

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_peft import errors, narrow_matmul
from moe_peft.routing import context, losses

RouterFactory = Callable[..., "Router"]
RNG = "routing"
PRECISION = jax.lax.Precision.HIGHEST  # of logits


def check_positive(name: str, value: int) -> None:
    """Raises UserError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise errors.UserError(f"{name} is {value!r}; expected a whole number of at least 1.")


class AnyRouter(nn.Module, abc.ABC):
    """Base of routers over experts and over skills: what each says of itself."""

    option: ClassVar[str]  # its name where a method takes the argument `routing`
    # why no fixed kernel does the same as an adapter with this router; None for one that gives
    # every token of a task the same weights
    why_not_merged: ClassVar[str | None] = "may decide for every token"
    # it has a row of logits for every task, which a new task can start from
    is_learned: ClassVar[bool] = False

    @property
    def num_ids(self) -> int:
        """Task ids it tells apart, 0 to num_ids - 1; 1 if tasks do not matter."""
        return getattr(self, "num_tasks", 1)

    @staticmethod
    def published(shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
        """As `adapters.Adapter.published`, for leaves of routers."""
        del shapes
        return {}

    def routing_key(self, what: str) -> Array:
        """Returns a key of the rng "routing". Raises UserError if it does not reach the router."""
        if not self.has_rng(RNG):
            raise errors.UserError(
                f"{'/'.join(self.path)} {what}, but the rng 'routing' does not reach it: the "
                "model's scan has to split it (split_rngs={'routing': True})."
            )
        return self.make_rng(RNG)


class Router(AnyRouter):
    """Base of routers over experts."""

    num_experts: int  # at least 1

    def __post_init__(self) -> None:
        check_positive("num_experts", self.num_experts)
        super().__post_init__()

    @abc.abstractmethod
    def __call__(self, site: context.Site) -> Float[Array, "... e"]:
        """Returns the weights of the experts."""


class UniformRouter(Router):
    """The same weight 1/E for every expert, everywhere."""

    option: ClassVar[str] = "uniform"
    why_not_merged: ClassVar[str | None] = None

    def __call__(self, site: context.Site) -> Float[Array, "... e"]:
        """Returns [1, ..., 1, e]."""
        shape = (1,) * site.num_token_axes + (self.num_experts,)
        return jnp.full(shape, 1.0 / self.num_experts, jnp.float32)


class SoftmaxRouter(Router):
    """`softmax(x W)` over the experts, in float32; W has no bias and starts at N(0, 0.02^2).

    MoV and MoLoRA (appendix A.5 and released code). What x is, subclasses say.
    """

    # keep the k most probable experts, the others get weight 0 and no gradient; None merges all of
    # them (the papers' choice)
    top_k: int | None = None
    # divide the kept weights by their sum. Without it, as released, top-k scales MoV's activations
    # by the kept mass, so that a fresh MoV is not the identity. With it and k = 1 the weight is
    # always 1 and teaches the router nothing: only router losses do.
    renormalize: bool = True
    # in [0, 1); with an rng "routing", x is multiplied by uniform(1 - jitter, 1 + jitter) in
    # training
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
            if self.top_k > self.num_experts:
                raise errors.UserError(
                    f"top_k is {self.top_k}, more than num_experts, {self.num_experts}."
                )
        if not 0.0 <= self.jitter < 1.0:
            raise errors.UserError(f"jitter is {self.jitter}; expected 0 <= jitter < 1.")

    def route(
        self,
        x: Float[Array, "... i"],
        axis: str,
        mask: Bool[Array, "..."] | None,
        site: context.Site,
    ) -> Float[Array, "... e"]:
        """Returns the weights for inputs x, and sows the losses over decisions where `mask` is 1.

        Args:
            x: what to decide on.
            axis: logical name of its last axis.
            mask: one number per decision, [...]; None counts all.
            site: tells whether an rng was given and losses are wanted.
        """
        kernel = partitioning.param_with_axes(
            "kernel",
            nn.initializers.normal(0.02),
            (x.shape[-1], self.num_experts),
            jnp.float32,
            axes=(axis, "expert"),
        )
        kernel = kernel.astype(jnp.float32)
        if site.project is not None and x is site.router_input and not self.jitter:
            logits = site.project(kernel)
        else:
            x = self._jittered(x.astype(jnp.float32), site)
            logits = narrow_matmul.narrow_matmul(x, kernel, PRECISION)
        probs = jax.nn.softmax(logits)
        selected = self._selected(probs)
        if site.wants_losses and self.num_experts > 1 and not self.is_initializing():
            self._sow_losses(logits, probs, selected, mask)
        if self.top_k is None:
            return probs
        weights = probs * selected
        if self.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights

    def _jittered(self, x, site):
        if not self.jitter or not site.has_rng:
            return x
        key, low, high = self.routing_key("wants jitter"), 1.0 - self.jitter, 1.0 + self.jitter
        return x * jax.random.uniform(key, x.shape, minval=low, maxval=high)

    def _selected(self, probs):
        """1 for the experts a decision uses; under soft merging, for its most probable one."""
        _, indices = jax.lax.top_k(probs, self.top_k or 1)
        return jnp.sum(jax.nn.one_hot(indices, self.num_experts, dtype=probs.dtype), axis=-2)

    def _sow_losses(self, logits, probs, selected, mask):
        if not self.is_mutable_collection(losses.COLLECTION):
            raise errors.UserError(
                f"{'/'.join(self.path)} has router losses, but nothing carries them out: the "
                f"model's scan has to lift them (variable_axes={{'{losses.COLLECTION}': 0}})."
            )
        mask = jnp.ones(probs.shape[:-1]) if mask is None else mask
        mask = mask.astype(jnp.float32).ravel()
        flat = lambda a: a.reshape(-1, self.num_experts)
        fraction = flat(selected) / (self.top_k or 1)
        values = {
            losses.LOAD_BALANCING: losses.load_balancing(flat(probs), fraction, mask),
            losses.Z: losses.router_z(flat(logits), mask),
        }
        for name, value in values.items():
            self.sow(losses.COLLECTION, name, value, jnp.add, lambda: jnp.zeros((), jnp.float32))


class TokenRouter(SoftmaxRouter):
    """One decision per token (and per head, where it sees projected keys or values)."""

    option: ClassVar[str] = "token"
    why_not_merged: ClassVar[str | None] = "decides for every token"

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "... e"]:
        """Returns weights shaped like `site.router_input`, its last axis replaced by experts."""
        x = site.router_input
        mask = site.mask
        if mask is not None:
            if mask.shape != x.shape[: mask.ndim]:
                raise errors.UserError(
                    f"{'/'.join(self.path)} routes inputs of shape {x.shape}, but the mask of its "
                    f"tokens has shape {mask.shape}. Give RoutingContext the masks of this call."
                )
            mask = mask.reshape(mask.shape + (1,) * (x.ndim - 1 - mask.ndim))
            mask = jnp.broadcast_to(mask, x.shape[:-1])
        return self.route(x, site.router_axis, mask, site)


class SentenceRouter(SoftmaxRouter):
    """One decision per example, on its sentence embedding, shared by all tokens and heads.

    MoV, appendix A.3 (the paper leaves encoder and embedded text open).
    """

    option: ClassVar[str] = "sentence"
    why_not_merged: ClassVar[str | None] = "decides for every input text"

    @nn.compact
    def __call__(self, site: context.Site) -> Float[Array, "... e"]:
        """Returns weights [b, 1, e].

        Raises UserError without `RoutingContext.sentence_embeddings`, Float[b D].
        """
        x = site.context.sentence_embeddings
        if x is None:
            raise errors.UserError(
                f"{'/'.join(self.path)} routes by sentence, but the batch has no feature "
                "'sentence_embeddings' [batch, width]. Add a sentence encoder to the data, or "
                "choose routing='token'."
            )
        mask = None if site.mask is None else site.mask.any(axis=-1)
        weights = self.route(x, "unmodeled", mask, site)
        return weights.reshape(x.shape[0], *(1,) * (site.num_token_axes - 1), self.num_experts)
