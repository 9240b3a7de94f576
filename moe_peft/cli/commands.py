"""Commands that take settings from gin: what each calls, imports and sets before any file."""

from collections.abc import Sequence

from moe_peft.config import entry


def _from_macros(entry_point: str, *parameters: str) -> tuple[str, ...]:
    """Statements that give parameters the values of the macros of their names."""
    return tuple(f"{entry_point}.{name} = %{name.upper()}" for name in parameters)


COMMANDS = {
    "plan": entry.Command(
        entry_point="plan",
        help="show what would be adapted and trained, without weights",
        example=(
            "  moe-peft plan --gin_file models/t5_1_1_xl.gin --gin_file methods/mov.gin\n"
            "  moe-peft plan --gin_file experiments/cldr/mov.gin --json"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.preflight.plan"),
        defaults=(
            *("NOMINAL_SIZE = None", "TARGET_METHOD = None"),
            *_from_macros("plan", "target_method", "model", "method", "nominal_size"),
        ),
        # Unlike the commands that load it: a plan needs no weights.
        optional=("BACKBONE",),
    ),
    "train": entry.Command(
        entry_point="train",
        help="adapt a frozen backbone, or go on where an earlier run stopped",
        example=(
            "  moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov\n"
            "  moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=/tmp/try "
            "--gin.TRAIN_STEPS=20"
        ),
        modules=("moe_peft.training.train",),
    ),
    "preflight": entry.Command(
        entry_point="preflight",
        help="compile training or evaluation for TPUs or GPUs that are not here; say if it fits",
        example=(
            "  moe-peft preflight --gin_file experiments/mov/3b/mov_10.gin --target v5e:4x4 "
            "--mesh model=4\n"
            "  moe-peft preflight --gin_file experiments/mov/11b/mov_30.gin --target v5e-256 "
            "--search"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.preflight.programs"),
        defaults=(
            *("FROZEN_DTYPE = 'bfloat16'", "EVAL_BATCH_SIZE = 64"),
            *_from_macros("preflight", "eval_batch_size", "model", "method", "optimizer"),
            *_from_macros("preflight", "feature_lengths", "batch_size", "frozen_dtype"),
            "preflight.loss = @LossConfig()",
        ),
    ),
    "adapt": entry.Command(
        entry_point="adapt",
        help="adapt a multi-task run, or the bare backbone, to new tasks with a few examples",
        example=(
            "  moe-peft adapt --gin_file experiments/cldr/fewshot/lora.gin "
            "--gin.MODEL_DIR=results/fewshot/lora \\\n    --gin.SOURCE=results/cldr/lora"
        ),
        modules=("moe_peft.adaptation.adapt",),
    ),
    "eval": entry.Command(
        entry_point="evaluate",
        help="evaluate a trained run, or the bare backbone, over tasks and templates",
        example=(
            "  moe-peft eval --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov\n"
            "  moe-peft eval --gin_file experiments/cldr/frozen.gin --gin.MODEL_DIR=results/frozen"
        ),
        modules=("moe_peft.evaluation.evaluate",),
    ),
    "infer": entry.Command(
        entry_point="infer",
        help="write answers to the lines of a text file",
        example=(
            "  moe-peft infer --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov \\\n"
            "    --gin.INPUTS=questions.txt --gin.OUTPUTS=answers.jsonl"
        ),
        modules=("moe_peft.evaluation.infer",),
    ),
    "export": entry.Command(
        entry_point="export",
        help="write the trained parameters of a run as one safetensors file",
        example=(
            "  moe-peft export --gin.MODEL_DIR=results/mov --gin.OUTPUTS=mov.safetensors\n"
            "  moe-peft export --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov "
            "--gin.OUTPUTS=mov.safetensors"
        ),
        modules=("moe_peft.convert.export",),
        defaults=(*_from_macros("export", "model_dir"), "export.path = %OUTPUTS"),
    ),
    "merge": entry.Command(
        entry_point="merge",
        help="fold a run's adapters into the network's weights, for one task, as a backbone file",
        example=(
            "  moe-peft merge --gin_file experiments/cldr/lora.gin --gin.MODEL_DIR=results/lora "
            "\\\n    --gin.OUTPUTS=merged.safetensors\n"
            "  moe-peft merge --gin_file results/mhr/config.gin --gin.TASK=3 "
            "--gin.OUTPUTS=merged.safetensors"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.convert.merge"),
        defaults=(
            *("TASK = None", "FROZEN_DTYPE = 'float32'", "merge.path = %OUTPUTS"),
            *_from_macros("merge", "model", "method", "backbone", "model_dir"),
            *_from_macros("merge", "task", "frozen_dtype"),
        ),
    ),
}

# Verbs of `moe-peft data` that take settings.
_DATA_MODULES = ("moe_peft.models", "moe_peft.methods")  # what files of an experiment name
_DATA_DEFAULTS = ("include 'data/files.gin'", "MIXTURE = None", "TARGET_MIXTURE = None")
_DATA_DEFAULTS += ("EVAL_MIXTURES = ()",)
DATA_COMMANDS = {
    "data prepare": entry.Command(
        entry_point="data_prepare",
        help="make the caches of token ids beforehand, in parallel; goes on where it stopped",
        example=(
            "  moe-peft data prepare --gin_file data/p3.gin --gin.DATA_DIR=/data "
            "--gin.VOCABULARY=/models/t5/spiece.model --processes 8\n"
            "  moe-peft data prepare p3_t0 p3_heldout --gin.DATA_DIR=embedded:samples "
            "--gin.VOCABULARY=bytes"
        ),
        modules=(*_DATA_MODULES, "moe_peft.cli.data_prepare"),
        defaults=(
            *_DATA_DEFAULTS,
            "data_prepare.mixtures = (%MIXTURE, %TARGET_MIXTURE)",
            *_from_macros("data_prepare", "eval_mixtures"),
        ),
        reads_a_part=True,
    ),
    "data show": entry.Command(
        entry_point="data_show",
        help="print examples as the model sees them, with token ids and lengths",
        example=(
            "  moe-peft data show cldr_month_de --split validation\n"
            "  moe-peft data show superni_train --gin_file samples/superni.gin --count 2\n"
            "  moe-peft data show p3_t0 --gin_file samples/p3.gin --packed"
        ),
        modules=(*_DATA_MODULES, "moe_peft.cli.data_show"),
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
):
    """Returns a command's entry point, to be called; a UserError for the first wrong setting."""
    folders = [path for path in gin_search_paths.split(",") if path]
    return entry.configure(ALL[name], gin_files, gin_bindings, folders, ALL.values())
