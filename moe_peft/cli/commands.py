"""Commands that take settings from gin: what each calls, imports and sets before any file."""

from collections.abc import Collection, Sequence
import dataclasses
import functools
from typing import Any

from moe_peft.config import entry


def _from_macros(entry_point: str, *parameters: str) -> tuple[str, ...]:
    """Statements that give parameters the values of the macros of their names."""
    return tuple(f"{entry_point}.{name} = %{name.upper()}" for name in parameters)


def _command(entry_point: str, help_line: str, *examples: str, **more: Any) -> entry.Command:
    """A command with example command lines, `moe-peft` left out."""
    return entry.Command(
        entry_point, help_line, "\n".join(f"  moe-peft {line}" for line in examples), **more
    )


# What files of an experiment name, in whatever order they include each other.
_NAMED = ("moe_peft.models", "moe_peft.methods", "moe_peft.training.optimizers")

COMMANDS = {
    "plan": _command(
        "plan",
        "show what would be adapted and trained, without weights",
        "plan --gin_file models/t5_1_1_xl.gin --gin_file methods/mov.gin",
        "plan --gin_file experiments/cldr/mov.gin --json",
        modules=(*_NAMED, "moe_peft.preflight.plan"),
        defaults=(
            *("NOMINAL_SIZE = None", "TARGET_METHOD = None"),
            *_from_macros("plan", "target_method", "model", "method", "nominal_size"),
        ),
        optional=("BACKBONE",),  # Unlike the commands that load it: a plan needs no weights.
    ),
    "train": _command(
        "train",
        "adapt a frozen backbone, or go on where an earlier run stopped",
        "train --method molora --backbone hf:./flan-t5-base --data train.jsonl --out runs/reviews",
        "train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov",
        "train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=/tmp/try --gin.TRAIN_STEPS=20",
        modules=("moe_peft.training.train",),
        defaults=("include 'runs/train.gin'",),
        optional=("LOG_TO",),
    ),
    "preflight": _command(
        "preflight",
        "compile training or evaluation for TPUs or GPUs that are not here; say if it fits",
        "preflight --gin_file experiments/mov/3b/mov_10.gin --target v5e:4x4 --mesh model=4",
        "preflight --gin_file experiments/mov/11b/mov_30.gin --target v5e-256 --search",
        modules=(*_NAMED, "moe_peft.preflight.programs"),
        defaults=(
            *("FROZEN_DTYPE = 'bfloat16'", "EVAL_BATCH_SIZE = 64"),
            *_from_macros("preflight", "eval_batch_size", "model", "method", "optimizer"),
            *_from_macros("preflight", "feature_lengths", "batch_size", "frozen_dtype"),
            "preflight.loss = @LossConfig()",
        ),
    ),
    "adapt": _command(
        "adapt",
        "adapt a multi-task run, or the bare backbone, to new tasks with a few examples",
        "adapt --gin_file experiments/cldr/fewshot/lora.gin "
        "--gin.MODEL_DIR=results/fewshot/lora \\\n    --gin.SOURCE=results/cldr/lora",
        modules=("moe_peft.adaptation.adapt",),
        defaults=("include 'runs/fewshot.gin'",),
    ),
    "eval": _command(
        "evaluate",
        "evaluate a trained run, or the bare backbone, over tasks and templates",
        "eval runs/reviews --data test.jsonl",
        "eval --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov",
        "eval --gin_file experiments/cldr/frozen.gin --gin.MODEL_DIR=results/frozen",
        modules=("moe_peft.evaluation.evaluate",),
        defaults=("include 'runs/eval.gin'",),
    ),
    "infer": _command(
        "infer",
        "write answers to the lines of a text file",
        "infer runs/reviews --inputs questions.jsonl --outputs answers.jsonl",
        "infer --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov \\\n"
        "    --gin.INPUTS=questions.txt --gin.OUTPUTS=answers.jsonl",
        modules=("moe_peft.evaluation.infer",),
        defaults=("include 'runs/infer.gin'",),
    ),
    "export": _command(
        "export",
        "write the trained parameters of a run as a file, or a folder with a model card",
        "export runs/reviews --to reviews_adapter",
        "export --gin.MODEL_DIR=results/mov --gin.OUTPUTS=mov.safetensors",
        "export --gin.MODEL_DIR=results/mov --gin.OUTPUTS=mov",
        "export --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov "
        "--gin.OUTPUTS=mov.safetensors",
        modules=("moe_peft.convert.export",),
        defaults=(*_from_macros("export", "model_dir"), "export.path = %OUTPUTS"),
    ),
    "merge": _command(
        "merge",
        "fold a run's adapters into the network's weights, for one task, as a backbone file",
        "merge runs/reviews --to merged.safetensors",
        "merge --gin_file experiments/cldr/lora.gin --gin.MODEL_DIR=results/lora \\\n"
        "    --gin.OUTPUTS=merged.safetensors",
        "merge --gin_file results/mhr/config.gin --gin.TASK=3 --gin.OUTPUTS=merged.safetensors",
        modules=(*_NAMED, "moe_peft.convert.merge"),
        defaults=(
            *("TASK = None", "FROZEN_DTYPE = 'float32'", "merge.path = %OUTPUTS"),
            *_from_macros("merge", "model", "method", "backbone", "model_dir"),
            *_from_macros("merge", "task", "frozen_dtype"),
        ),
    ),
}

# Verbs of `moe-peft data` that take settings.
_DATA_DEFAULTS = ("include 'data/files.gin'", "MIXTURE = None", "TARGET_MIXTURE = None")
_DATA_DEFAULTS += ("EVAL_MIXTURES = ()",)
DATA_COMMANDS = {
    "data prepare": _command(
        "data_prepare",
        "make the caches of token ids beforehand, in parallel; goes on where it stopped",
        "data prepare --gin_file data/p3.gin --gin.DATA_DIR=/data "
        "--gin.VOCABULARY=/models/t5/spiece.model --processes 8",
        "data prepare p3_t0 p3_heldout --gin.DATA_DIR=embedded:samples --gin.VOCABULARY=bytes",
        modules=(*_NAMED, "moe_peft.cli.data_prepare"),
        defaults=(
            *_DATA_DEFAULTS,
            "data_prepare.mixtures = (%MIXTURE, %TARGET_MIXTURE)",
            *_from_macros("data_prepare", "eval_mixtures"),
        ),
        reads_a_part=True,
    ),
    "data show": _command(
        "data_show",
        "print examples as the model sees them, with token ids and lengths",
        "data show cldr_month_de --split validation",
        "data show superni_train --gin_file samples/superni.gin --count 2",
        "data show p3_t0 --gin_file samples/p3.gin --packed",
        "data show train.jsonl --backbone hf:./flan-t5-base",
        modules=(*_NAMED, "moe_peft.cli.data_show"),
        defaults=(
            *(*_DATA_DEFAULTS, "FEATURE_LENGTHS = None"),
            *_from_macros("data_show", "feature_lengths"),
        ),
        reads_a_part=True,
    ),
}

ALL = {**COMMANDS, **DATA_COMMANDS}


def configure(
    name: str,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    gin_search_paths: str = "",
    flags: Collection[str] = (),
    statements: Sequence[str] = (),
):
    """Returns a command's entry point, to be called; a UserError for the first wrong setting.

    `flags` are those of the command line that set macros, for messages; `statements` come after
    the command's own defaults.
    """
    from moe_peft.cli import missing  # Imports gin.

    folders = [path for path in gin_search_paths.split(",") if path]
    complete = functools.partial(missing.statements, ALL[name].entry_point)
    command = dataclasses.replace(ALL[name], defaults=(*ALL[name].defaults, *statements))
    what = (command, gin_files, gin_bindings, folders, ALL.values())
    return entry.configure(*what, complete, flags)
