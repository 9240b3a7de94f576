"""What gin files bind: values with their places, and the references inside them."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import itertools
from typing import Any

import gin
from gin import config as gin_config

from moe_peft import errors
from moe_peft.config import registry

Key = tuple[str, str]  # (scope, full name of the configurable)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One `scope/name.parameter = value`, and where it was written.

    A macro is a binding of `gin.macro`'s parameter `value` in the scope of its name.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    where: str

    @property
    def name(self) -> tuple[str, str, str]:
        """What is bound."""
        return self.scope, self.selector, self.parameter

    @property
    def on_command_line(self) -> bool:
        """Whether a `--gin.` flag set it, rather than a file."""
        return self.where.startswith("--gin.")

    @property
    def is_macro(self) -> bool:
        """Whether this is `NAME = value`."""
        return self.selector == "gin.macro"

    @property
    def is_missing(self) -> bool:
        """Whether the value is gin.REQUIRED, or `%gin.REQUIRED` as a gin file writes it."""
        return self.value is gin.REQUIRED or (
            isinstance(self.value, gin_config.ConfigurableReference)
            and self.value.configurable.selector == "gin.constant"
            and "/".join(self.value.scopes) == "gin.REQUIRED"
        )

    def __str__(self):
        if self.is_macro:
            return self.scope
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{registry.short_name(self.selector)}.{self.parameter}"


@dataclasses.dataclass
class Config:
    """All bindings in force, and the earlier states they replaced."""

    # By (scope, configurable), then by parameter.
    bindings: dict[Key, dict[str, Binding]] = dataclasses.field(default_factory=dict)
    # A copy of `bindings` after each file of the command line and after the `--gin.` bindings. A
    # later file may replace a method: what it was given is then overridden, not forgotten.
    history: list[dict[Key, dict[str, Binding]]] = dataclasses.field(default_factory=list)
    # What the command itself binds, before any file: it may suit other networks or methods only.
    defaults: frozenset[tuple[tuple[str, str, str], str]] = frozenset()

    def bind(self, binding: Binding) -> None:
        """Sets one parameter here and in gin; a later value wins."""
        gin.bind_parameter(binding.name, binding.value)
        key = (binding.scope, binding.selector)
        self.bindings.setdefault(key, {})[binding.parameter] = binding

    def keep(self) -> None:
        """Remembers the present state in `history`."""
        self.history.append({key: dict(values) for key, values in self.bindings.items()})

    def end_of_defaults(self) -> None:
        """Remembers that what is bound by now comes from the command itself."""
        self.defaults = frozenset((each.name, each.where) for each in self.all_bindings())

    def is_default(self, binding: Binding) -> bool:
        """Whether the command itself binds this, or a file that it includes."""
        return (binding.name, binding.where) in self.defaults

    def forget(self, binding: Binding) -> None:
        """Takes one binding out, here and in gin, so that the resolved text leaves it out."""
        key = (binding.scope, binding.selector)
        for bound in (self.bindings, gin_config._CONFIG):
            del bound[key][binding.parameter]
            if not bound[key]:
                del bound[key]

    def macro(self, name: str) -> Binding | None:
        """The binding of a macro, or None where it has no value."""
        found = self.bindings.get((name, "gin.macro"), {}).get("value")
        return None if found is None or found.is_missing else found

    def all_bindings(self) -> Iterable[Binding]:
        """Every binding in force."""
        return (binding for values in self.bindings.values() for binding in values.values())

    def resolve(self, value: Any, depth: int = 0) -> Any:
        """The value with macros replaced; other references stay."""
        name = macro_name(value)
        if name is not None:
            if depth > 50:
                raise errors.UserError(f"The macro {name} refers to itself.")
            binding = self.macro(name)
            return gin.REQUIRED if binding is None else self.resolve(binding.value, depth + 1)
        if isinstance(value, dict):
            return {self.resolve(k, depth): self.resolve(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.resolve(item, depth) for item in value)
        return value


def references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    """Every `@name`, `@name()` and `%MACRO` inside a value."""
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in itertools.chain(*value.items()) if isinstance(value, Mapping) else value:
            yield from references(item)


def macro_name(reference: Any) -> str | None:
    """The name of a `%MACRO`, or None for anything else."""
    if not isinstance(reference, gin_config.ConfigurableReference):
        return None
    is_macro = reference.configurable.selector == "gin.macro"
    return "/".join(reference.scopes) if is_macro else None
