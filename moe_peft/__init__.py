"""Parameter-efficient mixtures of experts for T5 models in JAX."""

import importlib.util
import pathlib
import sys

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
