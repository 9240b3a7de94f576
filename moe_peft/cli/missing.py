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

LONGEST = {"inputs": 512, "targets": 128}  # tokens, where nobody says how many
_STEP = 8  # lengths are multiples of it
_FILES = "data.Files"
_NUM_LAYERS = ("num_encoder_layers", "num_decoder_layers")
_MANY_LAYERS = 6


def statements(command: str, config: bindings_lib.Config) -> list[str]:
    """Further defaults of a command; none where nothing is missing that something tells."""
    from moe_peft.cli import commands

    _check_one_source(config)
    if command == "eval" and _asks_files(config) and not _is_bound(config, "Evaluator", "decoding"):
        # So that answers are kept, and any accepted one counts.
        return ["Evaluator.decoding = @decoding.Greedy()", "Evaluator.rank_choices = True"]
    for name in checks.missing_macros(config, commands.ALL[command].entry_point):
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
    kind, _, place = (_value(config, "BACKBONE") or "").partition(":")
    if kind == "embedded":
        return [f"include 'models/{place}.gin'"]
    if kind not in ("hf", "t5x", "file"):
        return []
    from moe_peft.models import family
    from moe_peft.weights import formats

    found = formats.open_backbone(place, {"file": formats.ADAPTERS}.get(kind, kind)).config
    own = family.of(found)
    network, sizes = own.network.__name__, own.config.__name__
    lines = ["import moe_peft.models", f"MODEL = @models.{network}()"]
    lines.append(f"{network}.config = @models.{sizes}()")
    if max(getattr(found, name, 0) for name in _NUM_LAYERS) >= _MANY_LAYERS:
        found = dataclasses.replace(found, scan_layers=True)  # compiles one layer for all
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            lines.append(f"{sizes}.{field.name} = {value!r}")
    return lines


def _vocabulary(config: bindings_lib.Config) -> list[str]:
    kind, _, place = (_value(config, "BACKBONE") or "").partition(":")
    if kind == "embedded":
        return ["VOCABULARY = 'bytes'"]
    return [f"VOCABULARY = {place!r}"] if kind == "hf" else []


def _feature_lengths(config: bindings_lib.Config) -> list[str]:
    found = _files(config)
    if found is None:
        return []
    rounded = (-(-length // _STEP) * _STEP for length in found.longest())
    lengths = {
        name: min(length, limit)
        for (name, limit), length in zip(LONGEST.items(), rounded, strict=True)
    }
    return [f"FEATURE_LENGTHS = {lengths!r}"]


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
