"""What must be true of a configuration before it runs: see `check`.

Everything here is static: it follows references from the entry points (`train`, `evaluate`, ...)
through macros to every configurable the run can reach, without calling any of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import itertools

import gin

from moe_peft import errors
from moe_peft.config import bindings as bindings_lib
from moe_peft.config import macros, registry, value_types

_State = Mapping[bindings_lib.Key, Mapping[str, bindings_lib.Binding]]  # of Config.bindings


def check(
    config: bindings_lib.Config,
    root: str,
    entry_points: Collection[str] = (),
    called: Collection[str] = (),
    is_partial: bool = False,
    flags: Collection[str] = (),
) -> None:
    """Raises UserError for the first thing that is wrong, in this order.

    1. Macros that `root` or anything it refers to reads have no value: all are named, with those
       of the command's `flags` that set them.
    2. A value has the wrong type for its parameter's annotation (simple types only).
    3. A value that `root` or anything it refers to requires is missing.
    4. A binding that nothing reads: not `root`, no other entry point, nothing they refer to, now
       or before a later file replaced it. One of `macros.MACROS` that a file sets is excepted.

    `root` will be called without arguments. `entry_points` are those of other commands, which one
    file may serve too, and library code calls the configurables `called` itself. With `is_partial`,
    `root` reads a part of what files set, such as the data of an experiment; what nothing reads is
    then a mistake on the command line only.
    """
    root = registry.find(root).selector
    _check_macros(config, root, flags)
    _check_types(config)
    _check_required(config, root)
    _check_used(config, [root, *_known(entry_points, called)], is_partial)


def obsolete(
    config: bindings_lib.Config, entry_points: Collection[str], called: Collection[str]
) -> list[bindings_lib.Binding]:
    """The bindings that something read before a later file replaced it, and nothing reads now.

    Macros that files may set for whoever reads them are not among these.
    """
    unread = _unread(config, [config.bindings], _known(entry_points, called))
    return [binding for binding in unread if not _is_agreed(binding)]


def _known(*names: Collection[str]) -> list[str]:
    """Full names of those whose modules are imported."""
    known = filter(registry.is_known, itertools.chain(*names))
    return [registry.find(name).selector for name in known]


def _is_agreed(binding: bindings_lib.Binding) -> bool:
    return binding.is_macro and binding.scope in macros.MACROS


def missing_macros(config: bindings_lib.Config, root: str) -> dict[str, bindings_lib.Binding]:
    """The macros without a value that `root` or anything it refers to reads, and who needs each."""
    return {
        name: binding
        for *_, own in _reachable(config.bindings, registry.find(root).selector)
        for binding in own.values()
        for name in _macros_of(binding)
        if config.macro(name) is None
    }


def _check_macros(config: bindings_lib.Config, root: str, flags: Collection[str]) -> None:
    found = missing_macros(config, root)
    if not found:
        return
    asked = [name for name in found if macros.TOLD_BY.get(name) not in found] or list(found)
    name, binding = asked[0], found[asked[0]]
    defined = [key[0] for key in config.bindings if key[1] == "gin.macro"]
    near = errors.near(name, [other for other in defined if other != name])
    near = "" if name in macros.MACROS else near
    flag = lambda macro: f"--{macros.FLAGS.get(macro)}"
    how = lambda macro: f"{macro} ({flag(macro)})" if flag(macro) in flags else macro
    others = [how(other) for other in asked[1:]]
    also = f" Nor have {', '.join(others)}." if others else ""
    own = f", with {flag(name)}" if flag(name) in flags else ""
    raise errors.UserError(
        f"{name} has no value, and {binding} needs one ({binding.where}).{near}{also}"
        f" Set {'each' if others else 'it'} in a gin file{own} or with --gin.{name}=VALUE."
    )


def _macros_of(binding: bindings_lib.Binding) -> Iterator[str]:
    """Names of the macros that a value reads."""
    return filter(None, map(bindings_lib.macro_name, bindings_lib.references(binding.value)))


def _check_types(config: bindings_lib.Config) -> None:
    for binding in config.all_bindings():
        if binding.is_macro:
            continue
        hints = registry.types_of(binding.selector)
        value = config.resolve(binding.value)
        if binding.parameter not in hints or value_types.fits(value, hints[binding.parameter]):
            continue
        hint, name = hints[binding.parameter], bindings_lib.macro_name(binding.value)
        where, by = binding.where, ""
        if name is not None:
            where, by = config.macro(name).where, f", by way of {name}"
        raise errors.UserError(
            f"{where}: {binding} takes {value_types.describe(hint)}, got {value!r} "
            f"({type(value).__name__}){by}.{value_types.advice(value, hint)}"
        )


def _check_required(config: bindings_lib.Config, root: str) -> None:
    for selector, _, is_called, own in _reachable(config.bindings, root):
        if selector.startswith("gin."):
            continue
        for name, parameter in registry.signature(selector).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            needed = (gin.REQUIRED, parameter.empty) if is_called else (gin.REQUIRED,)
            is_needed = any(parameter.default is each for each in needed)
            if is_needed and (name not in own or own[name].is_missing):
                full = f"{registry.short_name(selector)}.{name}"
                how = f"Set it in a gin file or with --gin.{full}=VALUE."
                raise errors.UserError(f"{full} is required and has no value. {how}")


def _check_used(config: bindings_lib.Config, roots: Sequence[str], is_partial: bool) -> None:
    unread = [
        binding
        for binding in _unread(config, config.history, roots)
        if binding.on_command_line
        or not (is_partial or config.is_default(binding) or _is_agreed(binding))
    ]
    if not unread:
        return
    read = {name for binding in config.all_bindings() for name in _macros_of(binding)}
    read |= {name for name, selector, _ in _read(config.history, roots) if selector == "gin.macro"}
    listed = ", ".join(f"{binding} ({binding.where})" for binding in unread)
    hint = next((errors.near(b.scope, sorted(read)) for b in unread if b.is_macro), "")
    raise errors.UserError(f"Bound, but nothing in this run reads it: {listed}.{hint}")


def _unread(
    config: bindings_lib.Config, states: Sequence[_State], roots: Sequence[str]
) -> list[bindings_lib.Binding]:
    """The bindings in force that the roots read in none of the states."""
    read = _read(states, roots)
    return [binding for binding in config.all_bindings() if binding.name not in read]


def _read(states: Sequence[_State], roots: Sequence[str]) -> set[tuple[str, str, str]]:
    """Names of all bindings that the roots read in one of the states."""
    return {
        binding.name
        for state in states
        for root in roots
        for selector, scope, *_ in _reachable(state, root)
        for level in _levels(state, selector, scope)
        for binding in level.values()
    }


def _reachable(
    state: _State, root: str
) -> Iterator[tuple[str, tuple[str, ...], bool, dict[str, bindings_lib.Binding]]]:
    """(configurable, scope, whether gin calls it, its bindings) for all that `root` refers to."""
    seen, todo = set(), [(root, (), True)]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        selector, scope, _ = item
        own = {}
        for level in _levels(state, selector, scope):
            own |= level
        yield (*item, own)
        for binding in own.values():
            for reference in bindings_lib.references(binding.value):
                inner = tuple(reference.scopes) or scope
                todo.append((reference.configurable.selector, inner, reference.evaluate))


def _levels(state: _State, selector: str, scope: tuple[str, ...]) -> list[Mapping]:
    """What is bound for a configurable, from the outermost scope inwards; a later one wins."""
    return [state.get(("/".join(scope[:end]), selector), {}) for end in range(len(scope) + 1)]
