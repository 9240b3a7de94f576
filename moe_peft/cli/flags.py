"""Flags that stand for gin settings: `--steps 100` is `--gin.TRAIN_STEPS=100`.

A run, an argument of its own, stands for the `config.gin` in its folder. Only argument parsing is
imported here, so `--help` is instant.
"""

import argparse
from collections.abc import Callable, Mapping
import os
import pathlib
from typing import Any, NamedTuple

from moe_peft import errors
from moe_peft.config import macros


class Given(NamedTuple):
    """What a command line says of the settings, besides those that it gives in gin's own words."""

    files: list[str]  # before those of --gin_file
    bindings: list[str]  # before those of --gin.NAME=VALUE
    statements: list[str]  # after the command's defaults


def _number(text: str) -> float | str:
    return text if text == "auto" else float(text)


# What a flag takes besides a text.
_TYPES: Mapping[str, Callable[[str], Any]] = {
    "steps": int,
    "batch_size": int,
    "seed": int,
    "task": int,
    "shots": int,
    "max_inputs": int,
    "max_targets": int,
    "eval_fraction": float,
    "learning_rate": _number,
}
_PATHS = ("out", "to", "source", "inputs", "outputs", "vocabulary")
_SEVERAL = ("data", "eval_data")  # paths

_COLUMNS = ("inputs_column", "targets_column", "inputs_template")
_MORE_COLUMNS = (*_COLUMNS, "task_column", "choices_column", "bad_rows")
_NETWORK = ("method", "backbone", "model")
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "plan": _NETWORK,
    "preflight": (*_NETWORK, "batch_size"),
    "train": (
        *(*_NETWORK, "vocabulary", "data", "eval_data", "out", "steps", "batch_size"),
        *("learning_rate", "seed", "dtype", "frozen_dtype", "eval_fraction", "log_to"),
        *_MORE_COLUMNS,
    ),
    "adapt": (*_NETWORK, "source", "variant", "shots", "out", "steps", "batch_size", "seed"),
    "eval": (*_NETWORK, "vocabulary", "data", "out", "batch_size", "metric", *_MORE_COLUMNS),
    "infer": (*_NETWORK, "vocabulary", "inputs", "outputs", "batch_size", *_COLUMNS),
    "export": ("to",),
    "merge": ("to", "task"),
    "data show": ("backbone", "vocabulary", *_MORE_COLUMNS),
    "data check": (
        *("backbone", "vocabulary", "eval_data", *_COLUMNS, "task_column", "choices_column"),
        *("max_inputs", "max_targets"),
    ),
}
# Commands that take a run as an argument; whether they read its `config.gin`.
_RUNS = {"eval": True, "infer": True, "export": False, "merge": True}
# Where a flag sets another macro than `macros.FLAGS` says, by command.
_OTHER_MACROS = {
    "eval": {"data": "EVAL_DATA", "batch_size": "EVAL_BATCH_SIZE"},
    "infer": {"batch_size": "EVAL_BATCH_SIZE"},
    "export": {"to": "OUTPUTS"},
    "merge": {"to": "OUTPUTS"},
}
_PARAMETERS = {"metric": "Evaluator.metric"}  # flags that set a parameter, not a macro
_HELP = {
    "method": "what is adapted and what trains: a file of methods/, such as molora",
    "model": "the network: a file of models/; default: as the backbone's folder says",
    "data": "files with rows: .jsonl, .csv, .tsv, .parquet, or a folder",
    "learning_rate": "the peak; default: by method; auto: a few are tried",
    "metric": "of answers in text, such as exact_match or rouge_l",
    "variant": "what is taken over from --source: keep, new_logits, z, mu or soup",
    "log_to": "boards that show metrics, such as tensorboard,wandb",
    "out": "folder of the run",
    "to": "file or folder to write",
    "max_inputs": "tokens of a question that is not cut; default: 512",
    "max_targets": "tokens of an answer that is not cut; default: 128",
}
_CHOICES = {"dtype": ("float32", "bfloat16"), "frozen_dtype": ("float32", "bfloat16")}
_CHOICES["bad_rows"] = ("stop", "skip")


def macro_of(command: str, flag: str) -> str | None:
    """The macro that a flag of a command sets."""
    other = _OTHER_MACROS.get(command, {}).get(flag)
    named = [macro for macro, name in macros.FLAGS.items() if name == flag]
    same = flag.upper()  # several macros may be missing for want of one flag, which sets its own
    return other or (same if same in named else next(iter(named), None))


def of(command: str) -> tuple[str, ...]:
    """The flags of a command that set macros, as they are written."""
    return tuple(f"--{flag}" for flag in _FLAGS.get(command, ()))


def add(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the flags of a command to its parser, and the run that it takes."""
    if command in _RUNS:
        parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run")
    for flag in _FLAGS.get(command, ()):
        macro = macro_of(command, flag)
        parser.add_argument(
            f"--{flag}",
            type=_TYPES.get(flag, str),
            nargs="+" if flag in _SEVERAL else None,
            choices=_CHOICES.get(flag),
            metavar=None if flag in _CHOICES else flag.rpartition("_")[2].upper(),
            help=_HELP.get(flag) or macros.MACROS[macro].replace("`", ""),
        )


def given(command: str, args: argparse.Namespace) -> Given:
    """What the flags of a command say; a UserError for a run or a method that is not there."""
    found = Given([], [], [])
    values = {flag: getattr(args, flag) for flag in _FLAGS.get(command, ())}
    values = {flag: value for flag, value in values.items() if value is not None}
    if run := getattr(args, "run", None):
        if "out" in values:
            raise errors.UserError("--out is for evaluating a backbone; a run has its own folder.")
        _add_run(found, run, _RUNS[command])
    if command == "data show":
        _add_rows(found, args, values)
    if source := values.get("source"):
        _add_run(found, source, True, ["MODEL_DIR=%gin.REQUIRED"])
    if "variant" in values:
        found.files.append("methods/transferred.gin")
        found.bindings.append(f"VARIANT={values.pop('variant')!r}")
    for kind in ("model", "method"):
        if kind in values:
            _add_packaged(found, kind, values.pop(kind))
    if command == "eval" and "data" in values:
        found.files.append("data/own.gin")
        found.bindings.extend(["EVAL_MIXTURES=(@data.Files(),)", "TASK_GROUP=None"])
    if values.get("learning_rate") == "auto":
        del values["learning_rate"]
        found.bindings.append("train.searches_rate=True")
    for flag, value in values.items():
        name = _PARAMETERS.get(flag) or macro_of(command, flag)
        found.bindings.append(f"{name}={_absolute(flag, value)!r}")
    return found


def _add_rows(found: Given, args: argparse.Namespace, values: dict[str, Any]) -> None:
    from moe_peft.data import file_places

    if vocabulary := vocabulary_of(values.pop("backbone", None), values.pop("vocabulary", None)):
        values["vocabulary"] = vocabulary
    name, is_own = args.name, file_places.are_files(args.name)
    if is_own and "vocabulary" not in values and not (args.gin_file or args.gin_bindings):
        raise errors.UserError("Rows become ids by a vocabulary: give --backbone or --vocabulary.")
    found.bindings.append(f"data_show.name={'@data.Files()' if is_own else repr(name)}")
    if is_own:
        found.files.append("data/own.gin")
        values["data"] = [name]


def vocabulary_of(backbone: str | None, vocabulary: str | None) -> str | None:
    """The vocabulary that is given, or that the backbone tells; None where neither is given."""
    if backbone is None or vocabulary is not None:
        return vocabulary
    from moe_peft.weights import backbone as backbone_lib

    found = backbone_lib.vocabulary(backbone_lib.full_spec(backbone))
    if found is None:
        raise errors.UserError(
            f"--backbone {backbone} does not tell its vocabulary; give --vocabulary."
        )
    return found


def _add_run(found: Given, run: str, reads_config: bool, bindings: list[str] | None = None) -> None:
    folder = pathlib.Path(run).expanduser()
    config = folder / "config.gin"
    is_saved = folder.suffix == ".safetensors" or (folder / "adapter.safetensors").is_file()
    if reads_config and not config.is_file() and (is_saved or (folder / "checkpoints").is_dir()):
        found.statements.extend(_of_saved(folder))
    elif reads_config and not config.is_file():
        near = ""
        if not folder.exists() and folder.parent.is_dir():
            near = errors.near(folder.name, [path.name for path in folder.parent.iterdir()])
        what = "has no config.gin" if folder.is_dir() else "is not there"
        raise errors.UserError(
            f"The run {run} {what}; expected a folder that `moe-peft train` or `export` wrote."
            f"{near}"
        )
    elif reads_config:
        found.files.append(str(config))
    found.bindings.extend(bindings or [f"MODEL_DIR={str(folder.absolute())!r}"])


def _of_saved(path: pathlib.Path) -> list[str]:
    """What an adapter folder, or a run that Python trained, says of itself."""
    from moe_peft.weights import backbone, saved_run

    found = saved_run.description_of(path)
    spec, own = found.get("backbone_spec", ""), dict(found.get("files", {}))
    own.setdefault("vocabulary", backbone.vocabulary(spec))
    names = {"vocabulary": "VOCABULARY", "task_names": "TASKS"}
    settings = {names.get(name, name.upper()): value for name, value in own.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"BACKBONE": spec, "FROZEN_DTYPE": found["backbone"]["frozen_dtype"]}
    settings["FEATURE_LENGTHS"] = found.get("data", {}).get("feature_lengths")
    return [
        "import moe_peft.weights.records",
        "include 'data/own.gin'",
        "MODEL = @saved.network()",
        "METHOD = @saved.method()",
        "saved.network.source = %MODEL_DIR",
        "saved.method.source = %MODEL_DIR",
        *(f"{name} = {value!r}" for name, value in settings.items() if value is not None),
    ]


def _add_packaged(found: Given, kind: str, name: str) -> None:
    """A file of models/ or methods/ by its name.

    It comes before the user's files, which may change its settings, but not which one it is.
    """
    from moe_peft.config import packaged

    known = {path.stem: path for path in packaged.files(f"{kind}s")}
    errors.check_one_of(f"--{kind}", name, known)
    found.files.append(f"{kind}s/{name}.gin")
    macro = kind.upper()
    value = packaged.bindings(known[name]).get(macro)
    if value is None:
        raise errors.UserError(f"--{kind} {name}: {kind}s/{name}.gin sets no {macro}.")
    found.bindings.append(f"{macro}={value}")


def _absolute(flag: str, value: Any) -> Any:
    """The value with paths that mean the same in every folder."""
    full = lambda path: os.path.abspath(os.path.expanduser(path))
    if flag in _SEVERAL:
        paths = [full(path) for path in value]
        return paths[0] if len(paths) == 1 else paths
    if flag == "vocabulary" and value == "bytes":
        return value
    if flag in _PATHS:
        kind, colon, path = value.rpartition(":")
        return f"{kind}{colon}{full(path)}" if "://" not in value else value
    if flag == "backbone":
        from moe_peft.weights import backbone

        return backbone.full_spec(value)
    return value
