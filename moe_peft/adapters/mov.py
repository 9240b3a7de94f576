"""(IA)3 and MoV: learned vectors that scale activations."""

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_peft import errors, routing
from moe_peft.adapters import scaling


class IA3(nn.Module):
    """`y = l * outputs`, one learned vector, ones at first: the identity.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", section 3.3. With a router it is `MoV`.

    Attributes:
        num_experts: sets of vectors; 1 without a router.
        router_factory: called as `router_factory(num_experts=..., name="router")`.

    Example:
        y = IA3().apply(variables, inputs, outputs, routing.Site())
    """

    num_experts: int = 1
    router_factory: routing.RouterFactory | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        check_router(self)
        super().__post_init__()

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
        features = outputs.shape[site.num_token_axes :]
        experts, expert_axis = (
            ((self.num_experts,), ("expert",)) if self.router_factory else ((), ())
        )
        vectors = partitioning.param_with_axes(
            "vectors",
            nn.initializers.ones,
            experts + features,
            jnp.float32,
            axes=expert_axis + site.out_axes,
        )
        vectors = vectors.astype(jnp.float32)
        if self.router_factory is None:
            vectors = vectors.reshape((1,) * site.num_token_axes + features)
        else:
            weights = self.router_factory(num_experts=self.num_experts, name="router")(site)
            vectors = scaling.mix_vectors(weights, vectors, site.num_token_axes)
        return scaling.scale_features(outputs, vectors)


class MoV(IA3):
    """`y = (sum_e p_e l_e) * outputs`: (IA)3 vectors mixed by a router; the identity at first.

    "Pushing Mixture of Experts to the Limit" (Zadouri et al. 2023), MoV. Without renormalisation,
    top-k routing starts at `y = (sum of kept p) * outputs` instead.
    """

    num_experts: int = 10
    router_factory: routing.RouterFactory | None = routing.TokenRouter


def check_router(adapter: nn.Module) -> None:
    """Raises UserError unless `num_experts` and `router_factory` of an adapter fit each other."""
    routing.check_positive("num_experts", adapter.num_experts)
    if adapter.router_factory is not None:
        adapter.router_factory(num_experts=adapter.num_experts, parent=None)
    elif adapter.num_experts > 1:
        raise errors.UserError(
            f"{type(adapter).__name__} has {adapter.num_experts} experts and no router; give it a "
            "router_factory such as routing.TokenRouter."
        )
