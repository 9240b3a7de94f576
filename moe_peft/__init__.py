"""Parameter-efficient mixtures of experts for T5 models in JAX."""

import importlib
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_peft import methods
    from moe_peft.api.loading import as_seqio_task, load
    from moe_peft.api.model import Model
    from moe_peft.errors import UserError

__version__ = "0.1.0"


def _find_tasks() -> None:
    """Makes `moe_peft.tasks` importable from a checkout, where it is the folder next to this one.

    An installation has it inside the package.
    """
    package = pathlib.Path(__file__).resolve().parent
    start = package.parent / "tasks" / "__init__.py"
    if (package / "tasks").is_dir() or not start.is_file():
        return
    name = f"{__name__}.tasks"
    spec = importlib.util.spec_from_file_location(
        name, start, submodule_search_locations=[str(start.parent)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()["tasks"] = module


_find_tasks()

# What there is for users in Python, by its module, which is imported when it is asked for.
_LAZY = {
    "load": "api.loading",
    "as_seqio_task": "api.loading",
    "Model": "api.model",
    "UserError": "errors",
}

__all__ = ["Model", "UserError", "as_seqio_task", "load", "methods"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name == "methods":
        return importlib.import_module(f"{__name__}.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
