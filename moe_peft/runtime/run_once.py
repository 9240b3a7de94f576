"""Programs that run once, such as making fresh parameters."""

from collections.abc import Callable
from typing import Any

import jax

# XLA's effort on a CPU: a random draw of every leaf compiles three times as fast. It differs in the
# last bit from one that was compiled with full effort, so nothing whose digest is kept is made so.
_LITTLE_EFFORT = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `jax.jit` of a function that compiles for longer than it runs."""
    is_cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=_LITTLE_EFFORT if is_cpu else None)
