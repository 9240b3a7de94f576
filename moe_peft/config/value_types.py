"""Whether a value of a gin file fits the annotation of its parameter.

Written out because no library decides as gin needs it: every item of a container is looked at
(beartype draws one at random), references pass, a bool is not a number, a str is not a sequence.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import types
import typing
from typing import Any

import gin
from gin import config as gin_config

from moe_peft import errors
from moe_peft.config import registry

_LITERALS = (bool, int, float, str, tuple, list, dict)
_UNIONS = (typing.Union, types.UnionType)


def fits(value: Any, hint: Any) -> bool:
    """Whether a literal fits a type hint. References fit, and what cannot be decided."""
    if isinstance(value, gin_config.ConfigurableReference) or value is gin.REQUIRED:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, option) for option in args)
    if origin is typing.Literal:
        return value in args
    if hint in (None, types.NoneType):
        return value is None
    if inspect.isclass(origin):
        return _fits_container(value, origin, args)
    if not inspect.isclass(hint) or hint in (Any, object) or getattr(hint, "_is_protocol", False):
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) or not isinstance(value, (*_LITERALS, types.NoneType))


def _fits_container(value: Any, origin: type, args: tuple[Any, ...]) -> bool:
    if issubclass(origin, Mapping):
        is_fitting = lambda pair: all(map(fits, pair, args))
        return isinstance(value, Mapping) and all(map(is_fitting, value.items()))
    if issubclass(origin, Sequence):
        # A str is a Sequence too, but "abc" for names is a mistake.
        if not isinstance(value, origin if origin in (list, tuple) else (list, tuple)):
            return False
        if origin is tuple and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(item, args[0]) for item in value)
    return not isinstance(value, _LITERALS) or origin not in (Callable, type)


def describe(hint: Any) -> str:
    """Returns a type hint as a message has it: "str or None"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "None"
    if origin in _UNIONS:
        return " or ".join(map(describe, args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is not None:
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))


def advice(value: Any, hint: Any) -> str:
    """Returns what to write where an object is wanted and a name in quotes came, else ""."""
    options = typing.get_args(hint) or (hint,)
    wanted = [o for o in options if inspect.isclass(o) and o not in (*_LITERALS, types.NoneType)]
    if not (isinstance(value, str) and wanted):
        return ""
    names = registry.names()
    name = value if value in names else "name"
    return f" Refer to one, as in @{name}(), without quotes.{errors.near(value, names)}"
