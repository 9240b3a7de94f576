"""What a command line leaves out and the rest of it tells, as gin statements.

The backbone's folder tells the network and the vocabulary; the user's files tell lengths and tasks;
the method tells optimiser and learning rate. A file or a flag that sets the same wins.
"""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any

from moe_peft import errors
from moe_peft.config import bindings as bindings_lib
from moe_peft.config import checks

_FILES = "data.Files"


def statements(entry_point: str, config: bindings_lib.Config) -> list[str]:
    """Further defaults of a command; none where nothing is missing that something tells."""
    _check_one_source(config)
    if (
        entry_point == "evaluate"
        and _asks_files(config)
        and not _is_bound(config, "Evaluator", "decoding")
    ):
        # So that answers are kept, and any accepted one counts.
        return ["Evaluator.decoding = @decoding.Greedy()", "Evaluator.rank_choices = True"]
    for name in checks.missing_macros(config, entry_point):
        if name in _MAKERS and (found := _MAKERS[name](config)):
            return found
    return []


def _value(config: bindings_lib.Config, macro: str) -> Any:
    """What a macro is; None where it has no value."""
    found = config.macro(macro)
    return None if found is None else config.resolve(found.value)


def _check_one_source(config: bindings_lib.Config) -> None:
    mixture = config.macro("MIXTURE")
    if _value(config, "DATA") is not None and mixture and isinstance(mixture.value, str):
        raise errors.UserError(
            f"--data and the mixture {mixture.value!r} ({mixture.where}) exclude each other. Leave "
            "one of them out."
        )


def _asks_files(config: bindings_lib.Config) -> bool:
    mixtures = config.macro("EVAL_MIXTURES")
    named = bindings_lib.references(mixtures.value) if mixtures else ()
    return any(each.configurable.selector == _FILES for each in named)


def _is_bound(config: bindings_lib.Config, name: str, parameter: str) -> bool:
    return any(
        selector.rpartition(".")[2] == name and parameter in bound
        for (_, selector), bound in config.bindings.items()
    )


def _files(config: bindings_lib.Config) -> Any:
    """The user's files as `data.Files`; None where there are none, or no vocabulary yet."""
    from moe_peft.data import files

    bound = config.bindings.get(("", _FILES), {})
    values = {name: config.resolve(binding.value) for name, binding in bound.items()}
    if _value(config, "VOCABULARY") is None or not (values["data"] or values["eval_data"]):
        return None
    return files.Files(**values)


def _own_data(config: bindings_lib.Config) -> list[str]:
    given = _value(config, "DATA") or _value(config, "EVAL_DATA")
    return ["include 'data/own.gin'"] if given else []


def _model(config: bindings_lib.Config) -> list[str]:
    from moe_peft.weights import backbone

    found = backbone.network(_value(config, "BACKBONE") or "")
    if found is None:
        return []
    network, sizes = type(found).__name__, type(found.config).__name__
    lines = ["import moe_peft.models", f"MODEL = @models.{network}()"]
    lines.append(f"{network}.config = @models.{sizes}()")
    for field in dataclasses.fields(found.config):
        value = getattr(found.config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            lines.append(f"{sizes}.{field.name} = {value!r}")
            if field.name == "dropout_rate":  # The macro is what a user sets.
                lines[-1:] = [f"DROPOUT_RATE = {value!r}", f"{sizes}.dropout_rate = %DROPOUT_RATE"]
    return lines


def _vocabulary(config: bindings_lib.Config) -> list[str]:
    from moe_peft.weights import backbone

    found = backbone.vocabulary(_value(config, "BACKBONE") or "")
    return [f"VOCABULARY = {found!r}"] if found else []


def _feature_lengths(config: bindings_lib.Config) -> list[str]:
    found = _files(config)
    if found is None:
        return []
    return [f"FEATURE_LENGTHS = {found.lengths()!r}"]


def _num_tasks(config: bindings_lib.Config) -> list[str]:
    found = _files(config)
    if found is None:
        return []
    if not found.has_tasks:
        raise errors.UserError(
            f"This method routes by task, and {found} has no column {found.task_column!r}. Name "
            "the column with --task_column, or choose a method that does not, such as molora."
        )
    return [f"NUM_TASKS = {len(found.names)}", f"TASKS = {found.names!r}"]


def _learning_rate(config: bindings_lib.Config) -> list[str]:
    from moe_peft import methods

    name = _method_name(config)
    return [f"LEARNING_RATE = {methods.LEARNING_RATES[name]}"] if name else []


def _optimizer(config: bindings_lib.Config) -> list[str]:
    from moe_peft import methods

    if (name := _method_name(config)) is None:
        return []
    routes_by_task = "num_tasks" in inspect.signature(methods.METHODS[name]).parameters
    file = "adamw_mhr" if routes_by_task else "adamw"
    lines = ["import moe_peft.training.optimizers", f"include 'optimizers/{file}.gin'"]
    lines += ["adamw.weight_decay = 0.0", "adamw.clip_norm = 1.0"]
    return [*lines, "linear_warmup_linear_decay.peak = %LEARNING_RATE"]


def _method_name(config: bindings_lib.Config) -> str | None:
    """The constructor that METHOD names, if it is one of the registered methods."""
    from moe_peft import methods

    found = config.macro("METHOD")
    named = list(bindings_lib.references(found.value)) if found else []
    name = named[0].configurable.selector.rpartition(".")[2] if named else None
    return name if name in methods.LEARNING_RATES else None


_MAKERS: Mapping[str, Callable[[bindings_lib.Config], list[str]]] = {
    "MIXTURE": _own_data,
    "EVAL_MIXTURES": _own_data,
    "TASK_GROUP": _own_data,
    "MODEL": _model,
    "VOCABULARY": _vocabulary,
    "FEATURE_LENGTHS": _feature_lengths,
    "NUM_TASKS": _num_tasks,
    "OPTIMIZER": _optimizer,
    "LEARNING_RATE": _learning_rate,
    "TRAIN_STEPS": lambda config: ["TRAIN_STEPS = 1000"] if _own_data(config) else [],
    "BATCH_SIZE": lambda config: ["BATCH_SIZE = 32"] if _own_data(config) else [],
}
