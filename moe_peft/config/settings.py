"""A command's settings are the fields of one dataclass; everything else is made from them."""

import ast
from collections.abc import Callable
import dataclasses
import functools
import inspect
import textwrap
import typing
from typing import Any

import gin


def entry_point(settings: type, name: str, module: str) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers a command with gin, one parameter a field of `settings`.

    The decorated function takes one instance of `settings`, a dataclass with keyword-only fields
    and a comment above or behind each. What comes out takes the fields as keywords, has their
    signature and types, and a docstring made of their comments. gin calls it `module.name`.
    """

    def decorate(run):
        @functools.wraps(run)
        def command(**values: Any):
            return run(settings(**values))

        del command.__wrapped__  # gin must see the fields, not the one argument
        signature = inspect.signature(settings)
        command.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)
        command.__annotations__ = typing.get_type_hints(settings)
        lines = [f"  {field}: {text}" for field, text in comments(settings).items()]
        command.__doc__ = f"{inspect.cleandoc(run.__doc__)}\n\nArgs:\n" + "\n".join(lines)
        return gin.register(name, module=module)(command)

    return decorate


def comments(settings: type) -> dict[str, str]:
    """Returns the comment of every field, inherited ones too, from the lines above or behind it."""
    found = {}
    for parent in reversed(settings.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= _own_comments(parent)
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(settings)}


def _own_comments(settings: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(settings))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = node.lineno - 1
        while lines[above - 1].strip().startswith("#"):
            above -= 1
        behind = lines[node.end_lineno - 1][node.end_col_offset :]
        texts = [*lines[above : node.lineno - 1], behind]
        found[node.target.id] = " ".join(text.strip().lstrip("# ") for text in texts).strip()
    return found
