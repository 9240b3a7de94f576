"""A command that takes its settings from gin: they are read and checked before it is called.

Imports little, so that `moe-peft --help` is instant.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
import dataclasses
from typing import Any

# Configurables that library code calls itself, rather than by a reference from a gin file.
_CONFIGURED = ("sentences", "places", "bad_rows", "vocabularies", "superni", "crossfit", "p3")
CALLED_BY_LIBRARY = ("backbones.allowed", "partitioning.Layout", "task_ids.per_template")
CALLED_BY_LIBRARY += tuple(f"{module}.configured" for module in _CONFIGURED)


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand."""

    entry_point: str  # the gin configurable that is called without arguments
    help: str  # one line
    example: str  # complete command lines that work
    modules: tuple[str, ...]  # imported before any gin file is read, the entry point's last
    defaults: tuple[str, ...] = ()  # gin statements read before any file
    # Macros that parameters of their names read only where files give a text, or several: no value
    # is needed.
    optional: tuple[str, ...] = ()
    # Whether it reads a part of what files set; what it does not read is then not a mistake.
    reads_a_part: bool = False


def configure(
    command: Command,
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    others: Iterable[Command] = (),
    complete: Callable[[Any], Sequence[str]] | None = None,
    flags: Collection[str] = (),
) -> Callable[..., Any]:
    """Reads and checks the settings of a command; returns its entry point, to be called.

    Arguments are as in `gin_files.load`; `others` are commands that the same files may serve.
    `complete` is given the configuration, and returns further defaults of the command, as long as
    there are some; `flags` are those that its parser knows. Raises UserError for the first mistake,
    before anything is computed.
    """
    import gin

    from moe_peft.config import checks, gin_files

    gin_files.import_modules(command.modules)
    defaults = list(command.defaults)
    config = gin_files.load(files, bindings, search_paths, defaults)
    while complete is not None and (more := complete(config)):
        defaults += more
        config = gin_files.load(files, bindings, search_paths, defaults)
    macros = {name: config.macro(name) for name in command.optional}
    is_text = lambda found: found is not None and isinstance(found.value, str | tuple)
    given = [name for name, found in macros.items() if is_text(found)]
    if given:
        more = [f"{command.entry_point}.{name.lower()}=%{name}" for name in given]
        config = gin_files.load(files, [*bindings, *more], search_paths, defaults)
    entry_points = [command.entry_point, *(other.entry_point for other in others)]
    what = (entry_points, CALLED_BY_LIBRARY, command.reads_a_part, flags)
    checks.check(config, command.entry_point, *what)
    for binding in checks.obsolete(config, entry_points, CALLED_BY_LIBRARY):
        config.forget(binding)
    return gin.get_configurable(command.entry_point)
