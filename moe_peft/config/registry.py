"""What is registered with gin: names, signatures, types of parameters."""

import inspect
import typing
from typing import Any

from gin import config as gin_config

from moe_peft import errors


def names() -> list[str]:
    """Returns full and short names of everything that can be configured."""
    found = [name for name, _ in gin_config._REGISTRY.items() if not name.startswith("gin.")]
    return sorted({*found, *(name.rsplit(".", 1)[-1] for name in found)})


def find(selector: str) -> gin_config.Configurable:
    """Returns the configurable with this full or short name; raises UserError if there is none."""
    matches = gin_config._REGISTRY.matching_selectors(selector)
    if len(matches) > 1:
        raise errors.UserError(f"{selector!r} is ambiguous: {' or '.join(sorted(matches))}.")
    if not matches:
        raise errors.UserError(unknown(selector))
    return gin_config._REGISTRY[matches[0]]


def is_known(name: str) -> bool:
    """Whether exactly one configurable has this full or short name."""
    return len(gin_config._REGISTRY.matching_selectors(name)) == 1


def unknown(selector: str) -> str:
    """Returns the message for a name that nothing has."""
    hint = errors.near(selector, names()) or errors.near(selector.rsplit(".", 1)[-1], names())
    imports = "" if hint else " Is an `import` of its module missing in the gin file?"
    return f"nothing named {selector!r} can be configured.{hint}{imports}"


def short_name(selector: str) -> str:
    """Returns the shortest name that is not ambiguous."""
    return gin_config._REGISTRY.minimal_selector(selector)


def signature(selector: str) -> inspect.Signature:
    """Returns the signature of the registered function or class."""
    return inspect.signature(gin_config._REGISTRY[selector].wrapped)


def parameters(selector: str) -> list[str]:
    """Returns the names of the parameters that gin may set."""
    configurable, found = gin_config._REGISTRY[selector], list(signature(selector).parameters)
    allowed, denied = configurable.allowlist or found, configurable.denylist or ()
    return [name for name in found if name in allowed and name not in denied]


def types_of(selector: str) -> dict[str, Any]:
    """Returns the annotations of the parameters; none where they cannot be read."""
    wrapped = gin_config._REGISTRY[selector].wrapped
    if inspect.isclass(wrapped) and not hasattr(wrapped, "__dataclass_fields__"):
        wrapped = wrapped.__init__
    try:
        return typing.get_type_hints(inspect.unwrap(wrapped))
    except (NameError, TypeError, AttributeError):
        return {}
