"""What all adapters share, and what each one says of itself to the rest of the package."""

from collections.abc import Mapping
from typing import Any, ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from moe_peft import errors, routing

Shapes = Mapping[str, tuple[int, ...] | None]


class Adapter(nn.Module):
    """Base of all adapters: `__call__(inputs, outputs, site)` and a field `router_factory`."""

    router_sizes: ClassVar[tuple[str, ...]] = ("num_experts",)  # fields that the router has too
    # what it returns is `outputs` times a vector, whatever the inputs. Only such an adapter can be
    # merged where it changes the inputs of a layer.
    only_scales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses sizes that a router cannot have."""
        sizes = self.sizes()
        for name, value in sizes.items():
            routing.check_positive(name, value)
        # Made once here, so that a router's bad settings fail before anything compiles.
        if self.make_router(parent=None) is None and max(sizes.values()) > 1:
            raise errors.UserError(
                f"{type(self).__name__} has {max(sizes.values())} experts and no router; give it a "
                "router_factory such as routing.TokenRouter."
            )
        super().__post_init__()

    @nn.nowrap
    def sizes(self) -> dict[str, int]:
        """Returns the fields named in `router_sizes`."""
        return {name: getattr(self, name) for name in self.router_sizes}

    @nn.nowrap
    def make_router(self, **kwargs: Any) -> nn.Module | None:
        """Returns the router, None without one: `name="router"` in a call, else `parent=None`."""
        if self.router_factory is None:
            return None
        return self.router_factory(**self.sizes(), **kwargs)

    @staticmethod
    def published(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of leaves that the released code of Poly and MHR stores otherwise.

        One size may be -1, what the others leave over.
        Optimisers that factor second moments depend on shapes, see `training.last_two_rms`.

        Args:
            shapes: of all leaves below one adapter by name, such as "lora_a" or "router/kernel";
                None for those that do not train.
        """
        del shapes
        return {}

    @staticmethod
    def average(
        name: str, modules: Float[Array, "..."], weights: Float[Array, "s"]
    ) -> Float[Array, "..."]:
        """Returns the leaf `name` of the one adapter that the modules of an inventory average to.

        Its axes may still be split where those of the modules are.
        """
        raise NotImplementedError
