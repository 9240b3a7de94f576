"""The argument parser of the command line. Its own imports are few, so `--help` is instant."""

import argparse

import moe_peft
from moe_peft.cli import commands as commands_lib

_GIN_HELP = """\
Settings come from gin files, as in T5X:
  --gin_file FILE           read FILE; repeat it, a later file wins
  --gin.NAME=VALUE          set one value; it wins over files (macros: --gin.TRAIN_STEPS=100,
                            parameters: --gin.mov.num_experts=20)
  --gin_search_paths A,B    also look for files in these folders
FILE is looked up in the working directory, in the search paths, then among the files that come with
the package (models/ methods/ data/ runs/ experiments/), which `moe-peft files` lists.
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser; `--gin.NAME=VALUE` is taken out before it runs."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="moe-peft",
        description="Trains mixtures of tiny adapters on a frozen T5.",
        epilog=_GIN_HELP + "\nStart with:\n" + commands_lib.COMMANDS["plan"].example,
        formatter_class=raw,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=moe_peft.__version__)
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in commands_lib.COMMANDS.items():
        sub = _add_settings(commands, name, command)
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        if name == "train":
            _add_distributed(sub)
        if name == "preflight":
            _add_preflight(sub)
    comparison = commands.add_parser(
        "compare",
        help="show evaluated or adapted runs side by side, as a table and a picture",
        description="Shows runs that `moe-peft eval` evaluated, or adaptations by `moe-peft "
        "adapt`, side by side.",
    )
    comparison.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run")
    comparison.add_argument(
        "--out", default="results", metavar="FOLDER", help="where to write table and picture"
    )
    _add_report(commands)
    _add_convert(commands)
    _add_aggregate(commands)
    _add_data(commands)
    _add_experiments(commands)
    files = commands.add_parser("files", help="list the gin files that come with the package")
    files.add_argument("--folder", action="store_true", help="print where they are instead")
    return top


def _add_distributed(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--distributed",
        metavar="HOST:PORT,COUNT,INDEX",
        help="train in COUNT processes, of which this is the INDEX-th, from 0; 'auto' asks the "
        "surroundings (TPU pods, Slurm, Open MPI), 'off' trains alone. Default: the same in "
        "MOE_PEFT_DISTRIBUTED, else what a Slurm step, a TPU slice or a Kubernetes job says",
    )
    sub.add_argument(
        "--distributed_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes (default: 300)",
    )


def _add_preflight(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--target", required=True, help="a TPU topology (v5e:4x4), slice (v4-256) or h100:COUNT"
    )
    sub.add_argument(
        "--slices", type=int, default=1, help="so many of the TPU slices together (default: 1)"
    )
    sub.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="sizes of data, fsdp and model (default: all devices along data), or auto: a rule "
        "chooses them, and micro-batches",
    )
    sub.add_argument(
        "--program",
        default="train",
        help="train (default), eval (scores choices, or exact match) or decode (answers in text, "
        "greedily unless --gin.preflight.decoding=@decoding.BeamSearch())",
    )
    sub.add_argument("--microbatches", type=int, default=1, help="parts of a batch (default: 1)")
    sub.add_argument(
        "--remat",
        default="full",
        help="what the backward pass computes again: none, minimal, full (default)",
    )
    sub.add_argument("--price", type=float, help="of a chip and hour, to tell the cost of steps")
    sub.add_argument(
        "--search",
        action="store_true",
        help="try meshes, micro-batches and remat policies, and rank what fits",
    )
    sub.add_argument(
        "--quick",
        action="store_true",
        help="compile with a TPU compiler's least effort: a third of the time or less, figures "
        "some per cent higher",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_settings(commands, name: str, command: commands_lib.Command) -> argparse.ArgumentParser:
    """A command, or verb of one, that takes settings from gin."""
    sub = commands.add_parser(
        name.split()[-1],
        help=command.help,
        description=command.help.capitalize() + ".",
        epilog=_GIN_HELP + "\nExamples:\n" + command.example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument("--gin_file", action="append", default=[], metavar="FILE")
    sub.add_argument("--gin_search_paths", default="", metavar="A,B")
    return sub


def _add_convert(commands) -> None:
    sub = commands.add_parser(
        "convert",
        help="backbones and adapters from one format into another: Hugging Face, T5X, PEFT",
        description=(
            "Converts whole models between Hugging Face, T5X and our own files, adapters between "
            "runs, our own files and PEFT; merges adapters into their backbone; averages adapters. "
            "What was written is read again and compared before it appears."
        ),
        epilog=(
            "A place is PATH or FORMAT:PATH; formats are hf, t5x, peft and, for a file "
            "*.safetensors, ours. What is at --from is detected.\nExamples:\n"
            "  moe-peft convert --from embedded:cldr_tiny --to hf:cldr_tiny\n"
            "  moe-peft convert --from results/cldr/lora --to peft:lora\n"
            "  moe-peft convert --from results/cldr/mhr --task 3 --to peft:task3\n"
            "  moe-peft convert --from results/cldr/lora --merge --to hf:merged\n"
            "  moe-peft convert --average a.safetensors b.safetensors --to soup.safetensors"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="source", metavar="PLACE", help="what to convert")
    what.add_argument("--average", nargs="+", metavar="PLACE", help="adapters to average")
    sub.add_argument("--to", required=True, metavar="PLACE", help="what to write")
    sub.add_argument("--weights", metavar="0.5,...", help="of --average; default: equal ones")
    sub.add_argument("--merge", action="store_true", help="fold the adapter into its backbone")
    sub.add_argument("--task", type=int, metavar="ID", help="task of a task-routed adapter")
    sub.add_argument("--member", metavar="TASK:SEED", help="run of an adaptation")
    sub.add_argument("--step", type=int, help="checkpoint of a run; default: the newest")
    sub.add_argument("--base", metavar="PLACE", help="backbone of an adapter that names none")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is written")
    sub.add_argument(
        "--scan_layers",
        action=argparse.BooleanOptionalAction,
        help="layout of a model's layers in T5X and in our own files; default: as it is",
    )
    sub.add_argument(
        "--t5x_layout", choices=("legacy", "orbax"), default="legacy", help="default: legacy"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace what is at --to")
    sub.add_argument("--seed", type=int, default=0, help="of the random batch")


def _add_report(commands) -> None:
    sub = commands.add_parser(
        "report",
        help="draw what runs recorded: task routing, gradient alignment",
        description=(
            "Draws everything that the folders of runs have data for: weights of tasks and skills, "
            "a tree of tasks by routing, the course of routing, gradient alignment."
        ),
    )
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run")
    sub.add_argument("--out", default="results", metavar="FOLDER", help="where to write pictures")
    sub.add_argument("--step", type=int, help="checkpoint to draw; default: the newest")
    sub.add_argument(
        "--group",
        metavar="REGEX",
        help="its first parenthesis is what a task is grouped by; default: the run's TASK_GROUP",
    )
    sub.add_argument(
        "--layers",
        metavar="REGEX",
        help="layers whose weights are drawn, such as 'decoder/layers_0/'; default: a few",
    )
    sub.add_argument(
        "--splits", metavar="0,1,...", help="splits (heads) whose weights are drawn; default: four"
    )


def _add_data(commands) -> None:
    group = commands.add_parser(
        "data",
        help="check, prepare and look at the data of benchmarks",
        description="Checks, prepares and shows the data that runs read.",
    )
    verbs = group.add_subparsers(dest="verb", metavar="verb", required=True)
    check = verbs.add_parser(
        "check",
        help="what is there, what is missing, what is damaged, what leaks",
        description=(
            "Reads all files of the benchmarks in a folder once and reports counts, hashes and "
            "findings by rule. Exits with 1 where the rules missing, damaged or leak found "
            "something; duplicate, count, hash and optional are for information."
        ),
    )
    check.add_argument(
        "folder", metavar="DIR", help="as DATA_DIR: holds superni/, crossfit/, p3/, or some of them"
    )
    check.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME",
        help="only this; may be repeated",
    )
    check.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="RULE",
        help="do not fail by missing, damaged or leak; may be repeated",
    )
    check.add_argument(
        "--no_hashes", action="store_true", help="do not hash files; half the reading"
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")

    prepare = _add_settings(verbs, "data prepare", commands_lib.DATA_COMMANDS["data prepare"])
    prepare.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="mixture or task; default: MIXTURE, TARGET_MIXTURE and EVAL_MIXTURES",
    )
    prepare.add_argument("--splits", default="", metavar="A,B", help="default: all")
    prepare.add_argument("--processes", type=int, default=1, metavar="N")
    prepare.add_argument("--json", action="store_true", help="print JSON")

    show = _add_settings(verbs, "data show", commands_lib.DATA_COMMANDS["data show"])
    show.add_argument("name", metavar="NAME", help="task, or mixture in the order of training")
    show.add_argument("--split", default="train")
    show.add_argument("--count", type=int, default=3, metavar="N", help="examples; default: 3")
    show.add_argument("--start", type=int, default=0, metavar="N", help="examples to leave out")
    show.add_argument("--packed", action="store_true", help="the first row of packed training")
    show.add_argument("--all_ids", action="store_true", help="do not shorten lists of ids")
    show.add_argument("--json", action="store_true", help="print JSON")


def _add_experiments(commands) -> None:
    sub = commands.add_parser(
        "experiments",
        help="list the rows of the papers' tables, their published values and what was checked",
        description="Lists the experiment files of the papers' tables, or checks them.",
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="such as mhr/t0_xl or mov/3b/mov_10")
    sub.add_argument("--paper", action="append", default=[], help="mhr, poly_s or mov")
    sub.add_argument("--table", action="append", default=[], help="as printed (6), or its folder")
    sub.add_argument("--size", action="append", default=[], help="770M, 3B or 11B")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.add_argument("--markdown", action="store_true", help="print the tables of the docs")
    sub.add_argument(
        "--check",
        choices=("parse", "plan", "run"),
        help="read all settings; count parameters at full size; run the two-minute versions",
    )
    sub.add_argument("--shard", metavar="I/N", help="check part I of N only")
    sub.add_argument("--again", action="store_true", help="repeat what was checked before")
    sub.add_argument("--record", metavar="FILE", help="where outcomes are kept")
    sub.add_argument(
        "--results",
        default="results",
        metavar="FOLDER",
        help="where full-size runs are, for their scores; default: %(default)s",
    )
    sub.add_argument(
        "--folder",
        default="results/experiments",
        help="where two-minute versions run; default: %(default)s",
    )


def _add_aggregate(commands) -> None:
    sub = commands.add_parser(
        "aggregate",
        help="average answers on disk anew: other groups, rules, metrics, intervals; no model",
        description=(
            "Averages the answers that `moe-peft eval` or `moe-peft adapt` left in folders. What "
            "is not given stays as it was evaluated."
        ),
    )
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run")
    sub.add_argument(
        "--average", metavar="RULE", help="tasks, groups, pooled_groups or examples count equally"
    )
    sub.add_argument(
        "--group", metavar="REGEX", help="its first parenthesis is what a task is reported under"
    )
    sub.add_argument("--metric", help="score answers in text by this metric")
    sub.add_argument(
        "--bootstrap", metavar="OVER", help="intervals over examples, templates or tasks"
    )
    sub.add_argument("--resamples", type=int, default=1000, help="of --bootstrap; default: 1000")
    sub.add_argument("--seed", type=int, default=0, help="of --bootstrap; default: 0")
    sub.add_argument("--out", metavar="FOLDER", help="where to write results.json and table.md")
