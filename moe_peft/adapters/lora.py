"""LoRA and MoLoRA: low-rank updates of frozen linear maps."""

import dataclasses
import math

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_peft import errors, narrow_matmul, routing
from moe_peft.adapters import adapter, low_rank


def mttl_uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draws lora_a as the released code of Poly and MHR does: uniform within 1/sqrt(3 * inputs).

    Its standard deviation is 1 / (3 sqrt(inputs)), whatever the number of experts or heads.
    """
    width = math.prod(shape[:-1])
    bound = 1.0 / math.sqrt(3 * width)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


A_INITS = {"normal": nn.initializers.normal(0.02), "uniform": mttl_uniform}


class LoRA(adapter.Adapter):
    """`y = outputs + alpha / rank * (inputs A) B`; B is zero at first, so y = outputs.

    Hu et al. 2021, "LoRA", section 4.1. With a router it is `MoLoRA`.

    Example:
        y = LoRA(rank=4).apply(variables, inputs, outputs, routing.Site())
    """

    rank: int  # at least 1
    alpha: float = 16.0  # scale times rank; MoV's code uses 16, Poly's uses 1
    dropout_rate: float = 0.0  # of the inputs of A, in [0, 1), when an rng "dropout" is given
    # law of lora_a: "normal", N(0, 0.02^2), as in MoV's code, or "uniform", as in Poly's
    # (`mttl_uniform`)
    a_init: str = "normal"
    num_experts: int = 1  # pairs of A and B; 1 without a router
    # called as `router_factory(num_experts=..., name="router")`
    router_factory: routing.RouterFactory | None = None

    def __post_init__(self) -> None:
        routing.check_positive("rank", self.rank)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise errors.UserError(
                f"dropout_rate is {self.dropout_rate}; expected 0 <= dropout_rate < 1."
            )
        errors.check_one_of("a_init", self.a_init, A_INITS)
        super().__post_init__()

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / self.rank

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], outputs: Float[Array, "..."], site: routing.Site
    ) -> Float[Array, "..."]:
        """Returns the updated outputs, in their own dtype.

        Args:
            inputs: [tokens..., *in features] of the frozen layer.
            outputs: [tokens..., *out features] of the frozen layer.
            site: where we are.
        """
        tokens, in_shape = inputs.shape[: site.num_token_axes], inputs.shape[site.num_token_axes :]
        out_shape = outputs.shape[site.num_token_axes :]
        lora_a, lora_b = self._factors(in_shape, out_shape, site)
        x = inputs.astype(outputs.dtype)
        has_dropout = self.dropout_rate > 0 and self.has_rng("dropout")
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not has_dropout).reshape(*tokens, -1)
        down, hidden = low_rank.joined(lora_a), []

        def project(kernel):
            """Router logits and rank-space activations in one product: half the thin products."""
            both = narrow_matmul.narrow_matmul(
                x, jnp.concatenate([down, kernel], axis=1), routing.PRECISION
            )
            hidden.append(both[..., : down.shape[1]])
            return both[..., down.shape[1] :]

        weights = None
        router = self.make_router(name="router")
        if router is not None:
            if site.routes_on_inputs and x.dtype == jnp.float32 and not has_dropout:
                site = dataclasses.replace(site, project=project)
            weights = router(site)
        hidden = hidden[0] if hidden else narrow_matmul.narrow_matmul(x, down)
        delta = low_rank.expand(hidden, lora_b, self.scale, weights)
        return outputs + delta.reshape(outputs.shape)

    def _factors(self, in_shape, out_shape, site):
        """Returns A [i, e, r] and B [e, r, o] with flat features."""
        param = partitioning.param_with_axes
        experts, rank = self.num_experts, self.rank
        has_experts = self.router_factory is not None
        dims, axes = ((experts, rank), ("expert", "rank")) if has_experts else ((rank,), ("rank",))

        def init_a(key):
            keys = jax.random.split(key, experts)
            each = jax.vmap(lambda k: A_INITS[self.a_init](k, (*in_shape, rank), jnp.float32))(keys)
            return jnp.moveaxis(each, 0, -2).reshape(*in_shape, *dims)

        zeros = nn.initializers.zeros
        lora_a = param("lora_a", init_a, axes=(*site.in_axes, *axes))
        lora_b = param("lora_b", zeros, dims + out_shape, jnp.float32, axes=axes + site.out_axes)
        return lora_a.reshape(-1, experts, rank), lora_b.reshape(experts, rank, -1)

    @staticmethod
    def published(shapes: adapter.Shapes) -> dict[str, tuple[int, ...]]:
        """A [*in, r] and B [r, *out] are matrices there; it has no MoLoRA."""
        a, b = (shapes.get(name) or () for name in ("lora_a", "lora_b"))
        # One LoRA has at most two axes of heads and so five in all; several have six at least.
        if (len(a) or 3) + (len(b) or 3) > 5:
            return {}
        return {"lora_a": (-1, *a[-1:]), "lora_b": (*b[:1], -1)}


class MoLoRA(LoRA):
    """`y = outputs + alpha / rank * sum_e p_e (inputs A_e) B_e`: LoRAs mixed by a router.

    "Pushing Mixture of Experts to the Limit" (Zadouri et al. 2023), MoLoRA, listing in appendix A.5
    (which has no alpha / rank; the released code has). The experts' updates are mixed, not their
    parameters, and in rank space: see `low_rank.low_rank_delta`.
    """

    num_experts: int = 10
    router_factory: routing.RouterFactory | None = routing.TokenRouter
