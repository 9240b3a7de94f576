"""Modules that gin files import: where they are looked for, and why an import fails."""

import os
import pkgutil
import sys
import sysconfig
import traceback

from moe_peft import errors


def add_working_directory() -> None:
    """Lets modules of the working directory be imported; they never hide installed ones."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        return
    if not {"", here} & set(sys.path):
        sys.path.append(here)


def reason(module: str, error: Exception) -> str:
    """Returns why the import of a module failed: where it was looked for, or what failed in it."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module}.".startswith(f"{missing}."):
        return _nowhere(missing)
    kind = "" if isinstance(error, errors.UserError) else f"{type(error).__name__}: "
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {kind}{error.msg}"
    return f"{_place(module, error)}{kind}{error}"


def _nowhere(name: str) -> str:
    """The message for a module that is not there."""
    parent, _, last = name.rpartition(".")
    folders = [folder or os.getcwd() for folder in sys.path]
    if parent:
        folders = getattr(sys.modules.get(parent), "__path__", None)
        if folders is None:
            return f"{parent!r} is a module, not a package, so it holds no {last!r}."
    near = errors.near(last, {each.name for each in pkgutil.iter_modules(folders)})
    python = sysconfig.get_path("stdlib")
    looked = dict.fromkeys(
        folder for folder in folders if os.path.isdir(folder) and not _is_below(folder, python)
    )
    return f"there is no module {name!r}.{near} Looked in: {', '.join(looked)}."


def _is_below(folder: str, python: str) -> bool:
    """Whether a folder is one of Python's own, which would only lengthen a message."""
    return folder.startswith(python) and "-packages" not in folder


def _place(module: str, error: Exception) -> str:
    """File and line where the module, or what it imports, failed; "" if no file did."""
    frames = [
        (frame.f_globals.get("__name__"), f"{frame.f_code.co_filename}:{line}: ")
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    # The first frames are those of whoever imports: they end where Python's machinery begins.
    names = [str(name) for name, _ in frames]
    start = next((n for n, name in enumerate(names) if name.startswith("importlib")), len(names))
    below = [(name, place) for name, place in frames[start:] if "importlib" not in str(name)]
    own = [place for name, place in below if name == module]
    return (own or [place for _, place in below] or [""])[-1]
