"""What must be true of a configuration before it runs: see `check`.

Everything here is static: it follows references from the entry points (`train`, `evaluate`, ...)
through macros to every configurable the run can reach, without calling any of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import inspect
import types
import typing
from typing import Any

import gin
from gin import config as gin_config

from moe_peft import errors
from moe_peft.config import gin_files

# The macros that the packaged files agree on. A file may set one that a command does not read, so
# that models, methods and data can be combined freely; any other unread name is a mistake.
MACROS = {
    "MODEL": "the network without adapters, `@models.Transformer()`",
    "NOMINAL_SIZE": "the size in the model's name, which papers divide by",
    "METHOD": "what is adapted and what trains, such as `@methods.mov()`",
    "VARIANT": "how it is transferred: `keep`, `new_logits`, `z`, `mu` or `soup`",
    "NUM_TASKS": "task ids of the mixture that task routers tell apart",
    "BACKBONE": "the network's own weights: `embedded:cldr_tiny`, `hf:/folder/of/transformers`, "
    "`t5x:/checkpoint`, `file:weights.safetensors`, `run:/a/run/of/full`, `random:0`",
    "MIXTURE": "name of the SeqIO mixture or task to train on",
    "EVAL_MIXTURES": "names of those to evaluate on, a tuple",
    "TARGET_MIXTURE": "name of the mixture of new tasks, where one file trains and adapts",
    "TARGET_METHOD": "what trains on new tasks, likewise",
    "TARGET_OPTIMIZER": "that of a run on a new task, likewise",
    "TARGET_STEPS": "updates of a run on a new task, likewise",
    "TARGET_BATCH_SIZE": "shots of a batch on a new task, likewise",
    "DATA_DIR": "folder of the benchmarks' files, or `embedded:samples`; None: $MOE_PEFT_DATA",
    "BAD_ROWS": "`stop` at the first bad row of a benchmark, or `skip` and count it",
    "VOCABULARY": "path of T5's SentencePiece model or of a folder with a tokenizer, or `bytes`",
    "INPUT_TOKENS": "longest input that prompts are made for, end mark included",
    "TASK_GROUP": "regular expression: what in a task's name it is reported under",
    "FEATURE_LENGTHS": "tokens kept of `inputs` and `targets`, a dictionary",
    "MODEL_DIR": "folder of the run",
    "SOURCE": "folder of the multi-task run that `adapt` starts from; None for fresh adapters",
    "SOURCE_MIXTURE": "what that run was trained on, where tasks are compared with new ones",
    "SHOTS": "training examples of each new task, a number or numbers by task name",
    "VALIDATION_SHOTS": "examples beside the shots that select and stop, likewise",
    "SEEDS": "of the shots and runs of `adapt`, a tuple",
    "WORDINGS": "consecutive rows of a task that are one example in other words",
    "INPUTS": "text file that `infer` reads, one question a line",
    "OUTPUTS": "file that `infer`, `export` or `merge` writes",
    "TASK": "id of the task that `merge` folds the adapters of",
    "TRAIN_STEPS": "updates in all",
    "BATCH_SIZE": "rows of a batch, over all devices",
    "EVAL_BATCH_SIZE": "rows of a batch in evaluation, over all devices",
    "OPTIMIZER": "such as `@optimizers.adafactor()`",
    "LEARNING_RATE": "the peak of an experiment's schedule",
    "SEED": "of fresh adapters, dropout and the order of the data",
    "DTYPE": "of activations, `float32` or `bfloat16`",
    "FROZEN_DTYPE": "of the frozen weights in memory, `float32` or `bfloat16`",
    "DROPOUT_RATE": "of the network while training, in [0, 1)",
}

_LITERALS = (bool, int, float, str, tuple, list, dict)


def check(
    config: gin_files.Config,
    root: str,
    entry_points: Collection[str] = (),
    called: Collection[str] = (),
    is_partial: bool = False,
) -> None:
    """Raises UserError for the first thing that is wrong, in this order.

    1. A macro that `root` or anything it refers to reads has no value.
    2. A value has the wrong type for its parameter's annotation (simple types only).
    3. A value that `root` or anything it refers to requires is missing.
    4. A binding that nothing reads: not `root`, no other entry point, nothing they refer to, now
       or before a later file replaced it. One of `MACROS` that a file sets is excepted.

    Args:
      config: what was read.
      root: name of the configurable that will be called without arguments.
      entry_points: roots of other commands; one file may serve several commands.
      called: configurables that library code calls itself rather than by a gin reference.
      is_partial: `root` reads a part of what files set, such as the data of an experiment; what
        nothing reads is then a mistake on the command line only.
    """
    root = _full_name(root)
    roots = [root, *(_full_name(name) for name in (*entry_points, *called) if _is_known(name))]
    _check_macros(config, root)
    _check_types(config)
    _check_required(config, root)
    _check_used(config, roots, is_partial)


def references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    """Every `@name`, `@name()` and `%MACRO` inside a value."""
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(key)
            yield from references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item)


def macro_name(reference: Any) -> str | None:
    """The name of a `%MACRO`, or None for anything else."""
    if not isinstance(reference, gin_config.ConfigurableReference):
        return None
    if reference.configurable.selector != "gin.macro":
        return None
    return "/".join(reference.scopes)


def _full_name(name: str) -> str:
    return gin_config._REGISTRY.get_match(name).selector


def _is_known(name: str) -> bool:
    return len(gin_config._REGISTRY.matching_selectors(name)) == 1


# Macros


def _check_macros(config: gin_files.Config, root: str) -> None:
    for *_, own in _reachable(config.bindings, root):
        for binding in own.values():
            for reference in references(binding.value):
                name = macro_name(reference)
                if name is not None and _is_missing(config.macro(name)):
                    raise errors.UserError(_no_value(config, name, binding))


def _is_missing(binding: gin_files.Binding | None) -> bool:
    """Whether nothing is bound, or gin.REQUIRED, or `%gin.REQUIRED` as a gin file writes it."""
    if binding is None or binding.value is gin.REQUIRED:
        return True
    value = binding.value
    return (
        isinstance(value, gin_config.ConfigurableReference)
        and value.configurable.selector == "gin.constant"
        and "/".join(value.scopes) == "gin.REQUIRED"
    )


def _no_value(config: gin_files.Config, name: str, binding: gin_files.Binding) -> str:
    defined = [key[0] for key in config.bindings if key[1] == "gin.macro" and key[0] != name]
    return (
        f"{name} has no value, and {binding} needs one ({binding.where})."
        f"{errors.near(name, defined) if name not in MACROS else ''}"
        f" Set it in a gin file or with --gin.{name}=VALUE."
    )


# Types


def _check_types(config: gin_files.Config) -> None:
    for binding in config.all_bindings():
        if binding.is_macro:
            continue
        hint = _hints(gin_config._REGISTRY[binding.selector]).get(binding.parameter)
        if hint is None:
            continue
        value, where = _resolve(config, binding.value), binding.where
        if not _fits(value, hint):
            name = macro_name(binding.value)
            if name is not None:
                where = config.macro(name).where
            came = f"{value!r} ({type(value).__name__})"
            by = f", by way of {name}" if name is not None else ""
            raise errors.UserError(
                f"{where}: {binding} takes {_describe(hint)}, got {came}{by}."
                f"{_reference_hint(value, hint)}"
            )


def _resolve(config: gin_files.Config, value: Any, depth: int = 0) -> Any:
    """The value with macros replaced; other references stay."""
    name = macro_name(value)
    if name is not None:
        if depth > 50:
            raise errors.UserError(f"The macro {name} refers to itself.")
        binding = config.macro(name)
        return gin.REQUIRED if _is_missing(binding) else _resolve(config, binding.value, depth + 1)
    if isinstance(value, dict):
        return {
            _resolve(config, key, depth): _resolve(config, item, depth)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(config, item, depth) for item in value)
    return value


def _hints(configurable: gin_config.Configurable) -> dict[str, Any]:
    wrapped = configurable.wrapped
    if inspect.isclass(wrapped) and not hasattr(wrapped, "__dataclass_fields__"):
        wrapped = wrapped.__init__
    try:
        return typing.get_type_hints(inspect.unwrap(wrapped))
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal fits a type hint; what cannot be decided fits."""
    if isinstance(value, gin_config.ConfigurableReference) or value is gin.REQUIRED:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is typing.Literal:
        return value in args
    if origin is not None and inspect.isclass(origin):
        return _fits_container(value, origin, args)
    if not inspect.isclass(hint) or hint in (Any, object) or _is_protocol(hint):
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) or not isinstance(value, (*_LITERALS, types.NoneType))


def _fits_container(value: Any, origin: type, args: tuple[Any, ...]) -> bool:
    if issubclass(origin, Mapping):
        key, item = args if len(args) == 2 else (Any, Any)
        return isinstance(value, Mapping) and all(
            _fits(k, key) and _fits(v, item) for k, v in value.items()
        )
    if issubclass(origin, tuple) and args and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_fits, value, args))
    if issubclass(origin, Sequence):
        wanted = origin if origin in (list, tuple) else (list, tuple)
        return isinstance(value, wanted) and all(_fits(item, args[0]) for item in value)
    return not isinstance(value, _LITERALS) or origin not in (Callable, type)


def _is_protocol(hint: type) -> bool:
    return bool(getattr(hint, "_is_protocol", False))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is types.NoneType:
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is not None:
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))


def _reference_hint(value: Any, hint: Any) -> str:
    """What to write where an object is wanted and a name in quotes came."""
    options = typing.get_args(hint) or (hint,)
    wanted = [o for o in options if inspect.isclass(o) and o not in (*_LITERALS, types.NoneType)]
    if not (isinstance(value, str) and wanted):
        return ""
    names = gin_files.configurable_names()
    name = value if value in names else "name"
    return f" Refer to one, as in @{name}(), without quotes.{errors.near(value, names)}"


# Reachability


def _reachable(
    bindings: Mapping[gin_files.Key, Mapping[str, gin_files.Binding]], root: str
) -> Iterator[tuple[str, tuple[str, ...], bool, dict[str, gin_files.Binding]]]:
    """(configurable, scope, whether gin calls it, its bindings) for all that `root` refers to."""
    seen = set()
    todo = [(root, (), True)]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        selector, scope, is_called = item
        own = {}
        for level in _levels(bindings, selector, scope):
            own.update(level)
        yield (*item, own)
        for binding in own.values():
            for reference in references(binding.value):
                inner = tuple(reference.scopes) or scope
                todo.append((reference.configurable.selector, inner, reference.evaluate))


def _levels(bindings, selector, scope) -> list[Mapping[str, gin_files.Binding]]:
    """What is bound for a configurable, from the outermost scope inwards; a later one wins."""
    return [bindings.get(("/".join(scope[:end]), selector), {}) for end in range(len(scope) + 1)]


def _check_required(config: gin_files.Config, root: str) -> None:
    for selector, _, is_called, own in _reachable(config.bindings, root):
        if selector.startswith("gin."):
            continue
        configurable = gin_config._REGISTRY[selector]
        for name, parameter in gin_files.signature(configurable).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            needed = parameter.default is gin.REQUIRED or (
                is_called and parameter.default is parameter.empty
            )
            if not needed or not _is_missing(own.get(name)):
                continue
            short = gin_config._REGISTRY.minimal_selector(selector)
            raise errors.UserError(
                f"{short}.{name} is required and has no value."
                f" Set it in a gin file or with --gin.{short}.{name}=VALUE."
            )


def obsolete(
    config: gin_files.Config, entry_points: Collection[str], called: Collection[str]
) -> list[gin_files.Binding]:
    """The bindings that something read before a later file replaced it, and nothing reads now.

    Macros that files may set for whoever reads them are not among these.
    """
    roots = [_full_name(name) for name in (*entry_points, *called) if _is_known(name)]
    used = _used([config.bindings], roots)
    return [
        binding
        for binding in config.all_bindings()
        if (binding.scope, binding.selector, binding.parameter) not in used
        and not (binding.is_macro and binding.scope in MACROS)
    ]


def _used(
    states: Sequence[Mapping[gin_files.Key, Mapping[str, gin_files.Binding]]], roots: Sequence[str]
) -> set[tuple[str, str, str]]:
    """(scope, configurable, parameter) of all that the roots read in one of the states."""
    return {
        (binding.scope, binding.selector, binding.parameter)
        for bindings in states
        for root in roots
        for selector, scope, *_ in _reachable(bindings, root)
        for level in _levels(bindings, selector, scope)
        for binding in level.values()
    }


def _check_used(config: gin_files.Config, roots: Sequence[str], is_partial: bool) -> None:
    used = _used(config.history, roots)
    unused = [
        binding
        for binding in config.all_bindings()
        if (binding.scope, binding.selector, binding.parameter) not in used
        and not (binding.is_macro and binding.scope in MACROS and not binding.on_command_line)
        and not (is_partial and not binding.on_command_line)
    ]
    if not unused:
        return
    read = sorted(
        {scope for scope, selector, _ in used if selector == "gin.macro"} | _asked(config)
    )
    listed = ", ".join(f"{binding} ({binding.where})" for binding in unused)
    hint = next((errors.near(b.scope, read) for b in unused if b.is_macro), "")
    raise errors.UserError(f"Bound, but nothing in this run reads it: {listed}.{hint}")


def _asked(config: gin_files.Config) -> set[str]:
    """Names of all macros that some value reads."""
    names = (macro_name(r) for b in config.all_bindings() for r in references(b.value))
    return {name for name in names if name is not None}
