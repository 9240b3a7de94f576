"""(IA)3 and MoV: learned vectors that scale activations."""

from typing import ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_peft import narrow_matmul, routing
from moe_peft.adapters import adapter


def mix_vectors(
    weights: Float[Array, "... e"], vectors: Float[Array, "e *features"], num_token_axes: int
) -> Float[Array, "..."]:
    """Returns `sum_e weights_e l_e`: [tokens..., *features].

    Args:
        weights: [tokens..., e], or [tokens..., h, e] with a decision per head (first feature).
        vectors: l, one set per expert.
        num_token_axes: tells the two apart.
    """
    if weights.ndim == num_token_axes + 1:
        mixed = narrow_matmul.narrow_matmul(weights, vectors.reshape(vectors.shape[0], -1))
        return mixed.reshape(*weights.shape[:-1], *vectors.shape[1:])
    return jnp.einsum("...he,ehk->...hk", weights, vectors)


def scale_features(x: Float[Array, "..."], vectors: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * vectors in the dtype of x, multiplied in float32."""
    # Scales start at one, where bfloat16 resolves 0.4 %: rounding them first would hide training.
    return (x.astype(jnp.float32) * vectors).astype(x.dtype)


class IA3(adapter.Adapter):
    """`y = l * outputs`, one learned vector, ones at first: the identity.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", section 3.3. With a router it is `MoV`.

    Example:
        y = IA3().apply(variables, inputs, outputs, routing.Site())
    """

    only_scales: ClassVar[bool] = True

    num_experts: int = 1  # sets of vectors; 1 without a router
    # called as `router_factory(num_experts=..., name="router")`
    router_factory: routing.RouterFactory | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], outputs: Float[Array, "..."], site: routing.Site
    ) -> Float[Array, "..."]:
        """Returns the scaled outputs, in their own dtype.

        Args:
            inputs: of the frozen layer, unused: routers see `site.router_input`.
            outputs: [tokens..., *features], what is scaled.
            site: where we are.
        """
        del inputs
        features, router = outputs.shape[site.num_token_axes :], self.make_router(name="router")
        experts, expert_axis = ((), ()) if router is None else ((self.num_experts,), ("expert",))
        vectors = partitioning.param_with_axes(
            "vectors",
            nn.initializers.ones,
            experts + features,
            jnp.float32,
            axes=expert_axis + site.out_axes,
        )
        vectors = vectors.astype(jnp.float32)
        if router is None:
            vectors = vectors.reshape((1,) * site.num_token_axes + features)
        else:
            vectors = mix_vectors(router(site), vectors, site.num_token_axes)
        return scale_features(outputs, vectors)

    @staticmethod
    def published(shapes: adapter.Shapes) -> dict[str, tuple[int, ...]]:
        """(IA)3 vectors [heads, head width] are [heads * head width] there; it has no MoV."""
        vectors = shapes.get("vectors") or ()
        is_routed = any(name.startswith("router/") for name in shapes)
        return {} if is_routed or len(vectors) != 2 else {"vectors": (-1,)}


class MoV(IA3):
    """`y = (sum_e p_e l_e) * outputs`: (IA)3 vectors mixed by a router; the identity at first.

    "Pushing Mixture of Experts to the Limit" (Zadouri et al. 2023), MoV. Without renormalisation,
    top-k routing starts at `y = (sum of kept p) * outputs` instead.
    """

    num_experts: int = 10
    router_factory: routing.RouterFactory | None = routing.TokenRouter
