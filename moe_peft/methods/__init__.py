"""The papers' methods by name: which adapter, on which layers, routed how, and what trains.

Everything else is derived from a `Method`: the trainable tree, learning-rate groups, what is saved,
parameter counts. `docs/methods.md` explains every option and where the papers differ.
"""

from collections.abc import Callable

from moe_peft.methods import targets
from moe_peft.methods.method import (
    ADAPTER_LEAVES,
    ADAPTERS,
    ALL_LEAVES,
    LEARNING_RATES,
    METHODS,
    NO_LEAVES,
    ROUTER_LEAVES,
    Method,
    Transfer,
    register,
)
from moe_peft.methods.mixtures import ROUTERS
from moe_peft.methods.targets import PLACEMENTS, ROUTER_INPUTS
from moe_peft.methods.task_routed import SKILL_ROUTERS


@register(learning_rate=1e-4)
def full() -> Method:
    """Full fine-tuning: no adapter, every weight trains."""
    return Method("full", trainable=ALL_LEAVES)


@register()
def frozen() -> Method:
    """The backbone as it is: no adapter, nothing trains."""
    return Method("frozen", trainable=NO_LEAVES)


def get(name: str) -> Callable[..., Method]:
    """Returns the constructor of a method by its name, or raises UserError with near names."""
    return targets.choose("method", name, METHODS)


# Every registered constructor by its own name: `methods.ia3`, `methods.lora`, ...
globals().update(METHODS)

__all__ = [
    "ADAPTERS",
    "ADAPTER_LEAVES",
    "ALL_LEAVES",
    "LEARNING_RATES",
    "METHODS",
    "Method",
    "NO_LEAVES",
    "PLACEMENTS",
    "ROUTERS",
    "ROUTER_INPUTS",
    "ROUTER_LEAVES",
    "SKILL_ROUTERS",
    "Transfer",
    "get",
    "register",
    *METHODS,
]
