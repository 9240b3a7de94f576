"""Reads gin files the way T5X does, and turns every mistake into one clear line.

gin itself accepts much that is wrong: a macro nobody reads, a binding of a function the run never
calls, a string where a number belongs. `load` therefore walks the statements of every file once,
remembers where each value was written, and `checks` looks at the whole before anything runs.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import difflib
import importlib
import pathlib
import re

import gin
from gin import config as gin_config
from gin import config_parser

import moe_peft
from moe_peft import errors
from moe_peft.config import bindings as bindings_lib
from moe_peft.config import imports, moved, registry
from moe_peft.runtime import tensorflow_logs

# A value on the command line that is not a gin value but looks like a name or a path is a string.
_BARE_STRING = re.compile(r"[A-Za-z~./_][\w./:~@+-]*")

# How gin says that a reference names nothing.
_NO_MATCH = re.compile(r"No configurable matching reference '@([\w./]+)")


def packaged_folder() -> pathlib.Path:
    """The gin folder of this installation: inside a wheel, or next to the package in a checkout."""
    package = pathlib.Path(moe_peft.__file__).parent
    for folder in (package / "gin", package.parent / "gin"):
        if (folder / "models").is_dir():
            return folder
    raise errors.UserError(f"The gin files are missing next to {package}; reinstall moe-peft-jax.")


def search_folders(search_paths: Sequence[str] = ()) -> list[pathlib.Path]:
    """Where gin files are looked up, in order: here, in some folders, in the package's `gin/`."""
    for path in search_paths:
        if not pathlib.Path(path).is_dir():
            raise errors.UserError(f"--gin_search_paths: there is no folder {path!r}.")
    return [pathlib.Path(), *map(pathlib.Path, search_paths), packaged_folder()]


def find_file(name: str, folders: Sequence[pathlib.Path]) -> pathlib.Path:
    """The first `folder/name` that exists, or an error with the nearest names."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    # The working directory may be large, so near names come from the other folders.
    places = ((folder, path) for folder in folders[1:] for path in folder.rglob("*.gin"))
    known = {path.relative_to(folder).as_posix() for folder, path in places}
    by_basename = [path for path in known if path.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
    close = sorted(by_basename) or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    where = ", ".join(str(folder.absolute()) for folder in folders)
    raise errors.UserError(f"There is no gin file {name!r}.{hint} Looked in: {where}.")


def load(
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    defaults: Sequence[str] = (),
) -> bindings_lib.Config:
    """Reads files, then bindings such as "TRAIN_STEPS=10", into gin's (cleared) configuration.

    A later file wins, bindings win over files, and the statements `defaults` come before them all.
    The value of a binding may be a bare word or path: a string. A UserError says file and line of
    what cannot be read or does not exist.
    """
    gin.clear_config()
    config = bindings_lib.Config()
    folders = search_folders(search_paths)
    _parse("\n".join(defaults), "defaults of the command", config, folders, ())
    config.end_of_defaults()
    for name in files:
        _parse_file(name, config, folders, ())
        config.keep()
    for binding in bindings:
        _parse(_quote_bare_string(binding), f"--gin.{binding}", config, folders, ())
    config.keep()
    return config


def _quote_bare_string(binding: str) -> str:
    name, equals, value = binding.partition("=")
    if not equals or not name or not value:
        raise errors.UserError(f"--gin.{binding}: expected --gin.NAME=VALUE.")
    try:
        list(config_parser.ConfigParser(f"x = {value}", gin_config.ParserDelegate()))
    except (SyntaxError, ValueError):
        if _BARE_STRING.fullmatch(value):
            value = repr(value)
    return f"{name} = {value}"


def _parse_file(name, config, folders, including) -> None:
    path = find_file(name, folders)
    if path in including:
        raise errors.UserError(f"{name} includes itself, by way of {including[-1]}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}") from error
    _parse(text, str(path), config, folders, (*including, path))


def _parse(text, source, config, folders, including) -> None:
    """Binds every statement of `text`; `including` are the files being read, outermost first."""
    line, is_file = 0, bool(including)
    place = lambda number: f"{source}:{number}" if is_file and number else source
    try:
        for statement in config_parser.ConfigParser(text, gin_config.ParserDelegate()):
            line = statement.location.line_num
            if isinstance(statement, config_parser.IncludeStatement):
                _parse_file(statement.filename, config, folders, including)
            elif isinstance(statement, config_parser.ImportStatement):
                _import(statement)
            elif isinstance(statement, config_parser.BindingStatement):
                config.bind(_binding(statement, place(line)))
            else:
                registry.find(statement.selector)
    except _Located:
        raise
    except SyntaxError as error:
        quotes = " Strings need quotes, as in --gin.NAME='\"text\"'." if not is_file else ""
        # The last line is gin's own; those above are of Python's literal parser.
        reason = error.msg.strip().splitlines()[-1].strip().rstrip(".")
        at = place(error.lineno)
        raise _Located(f"{at}: not gin syntax: {reason}.{quotes}") from error
    except (ValueError, ImportError) as error:
        # A reference fails while its statement is still being read: then the line is the next one
        # that says so.
        at = place(_line_of_reference(text, error, line) or line)
        match = _NO_MATCH.search(str(error))
        message = registry.unknown(match[1].rsplit("/", 1)[-1]) if match else one_line(error)
        raise _Located(f"{at}: {message}") from error


class _Located(errors.UserError):
    """An error that already says where it happened."""


def _line_of_reference(text: str, error: Exception, after: int) -> int | None:
    match = _NO_MATCH.search(str(error))
    lines = enumerate(text.splitlines(), start=1) if match else ()
    return next((n for n, line in lines if n > after and f"@{match[1]}" in line), None)


def _import(statement: config_parser.ImportStatement) -> None:
    statement = statement._replace(module=moved.current(statement.module))
    try:
        import_modules([statement.module])
    except Exception as error:
        why = imports.reason(statement.module, error)
        raise ImportError(f"cannot import {statement.module}: {why}") from error
    # Again through gin, which writes the import into the resolved configuration.
    gin.parse_config(statement.format())


def _binding(statement: config_parser.BindingStatement, where: str) -> bindings_lib.Binding:
    scope, selector, name, value, *_ = statement
    if not name:
        macro = "/".join(filter(None, (scope, selector)))
        return bindings_lib.Binding(macro, "gin.macro", "value", value, where)
    full_name = registry.find(selector).selector
    try:
        gin_config.ParsedBindingKey.parse((scope, selector, name))
    except ValueError:
        options = registry.parameters(full_name)
        hint = f"{errors.near(name, options)} It has: {', '.join(options) or 'none'}."
        raise errors.UserError(f"{selector} has no parameter {name!r}.{hint}") from None
    return bindings_lib.Binding(scope, full_name, name, value, where)


def one_line(error: BaseException) -> str:
    """The message of an exception without gin's call chain and without line breaks."""
    text = str(error).split("\n  In call to configurable", 1)[0]
    return " ".join(text.split()) or type(error).__name__


def resolved_text() -> str:
    """The whole configuration, macros and imports included, as a gin file that can be run again."""
    return gin.config_str(max_line_length=100)


def write_config(folder: pathlib.Path) -> None:
    """Writes the resolved configuration to `folder`/config.gin, for the record and to run again.

    There is none of a run that Python configures itself, see `set_aside`.
    """
    if not _aside:
        (folder / "config.gin").write_text(resolved_text(), encoding="utf-8")


_aside: list[None] = []


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Inside, nothing is configured: callers in Python say everything themselves."""
    before = dict(gin_config._CONFIG)
    gin_config._CONFIG.clear()
    _aside.append(None)
    try:
        yield
    finally:
        _aside.pop()
        gin_config._CONFIG.update(before)


def import_modules(names: Iterable[str]) -> None:
    """Imports modules so that what they register can be named in gin files."""
    with tensorflow_logs.silenced():
        for name in names:
            importlib.import_module(name)
