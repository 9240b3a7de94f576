"""The papers' methods by name: which adapter, on which layers, routed how, and what trains.

Everything else is derived from a `Method`: the trainable tree, learning-rate groups, what is saved,
parameter counts. `docs/methods.md` explains every option and where the papers differ.
"""

from collections.abc import Callable

import gin

from moe_peft.methods import targets
from moe_peft.methods.method import (
    ADAPTER_LEAVES,
    ALL_LEAVES,
    NO_LEAVES,
    ROUTER_LEAVES,
    Method,
    Transfer,
)
from moe_peft.methods.mixtures import ROUTERS, ia3, lora, lora_big, molora, mov
from moe_peft.methods.targets import PLACEMENTS, ROUTER_INPUTS
from moe_peft.methods.task_routed import SKILL_ROUTERS, mhr, poly, private, random_mu

__all__ = [
    "ADAPTER_LEAVES",
    "ALL_LEAVES",
    "METHODS",
    "Method",
    "NO_LEAVES",
    "PLACEMENTS",
    "ROUTERS",
    "ROUTER_INPUTS",
    "ROUTER_LEAVES",
    "SKILL_ROUTERS",
    "Transfer",
    "frozen",
    "full",
    "get",
    "ia3",
    "lora",
    "lora_big",
    "mhr",
    "molora",
    "mov",
    "poly",
    "private",
    "random_mu",
]


@gin.register(module="methods")
def full() -> Method:
    """Full fine-tuning: no adapter, every weight trains."""
    return Method("full", trainable=ALL_LEAVES)


@gin.register(module="methods")
def frozen() -> Method:
    """The backbone as it is: no adapter, nothing trains."""
    return Method("frozen", trainable=NO_LEAVES)


METHODS: dict[str, Callable[..., Method]] = {
    constructor.__name__: constructor
    for constructor in (
        *(ia3, lora, lora_big, mov, molora),
        *(poly, mhr, random_mu, private),
        *(full, frozen),
    )
}


def get(name: str) -> Callable[..., Method]:
    """Returns the constructor of a method by its name, or raises UserError with near names."""
    return targets.choose("method", name, METHODS)
