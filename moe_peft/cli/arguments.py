"""The argument parser of the command line. Its own imports are few, so `--help` is instant."""

import argparse
from typing import Any

import moe_peft
from moe_peft.cli import commands as commands_lib
from moe_peft.cli import completion, flags, listing, parsing
from moe_peft.config import entry

_GIN_HELP = """\
Settings come from gin files, as in T5X:
  --gin_file FILE           read FILE; repeat it, a later file wins
  --gin.NAME=VALUE          set one value; it wins over files (macros: --gin.TRAIN_STEPS=100,
                            parameters: --gin.mov.num_experts=20)
  --gin_search_paths A,B    also look for files in these folders
FILE is looked up in the working directory, in the search paths, then among the files that come with
the package (models/ methods/ data/ runs/ experiments/), which `moe-peft files` lists.
"""

# Long texts stay as they are written; a misspelt flag is not guessed.
_AS_WRITTEN: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


def parser() -> argparse.ArgumentParser:
    """The argument parser; `--gin.NAME=VALUE` is taken out before it runs."""
    top = parsing.Parser(
        prog="moe-peft",
        description="Trains mixtures of tiny adapters on a frozen T5.",
        epilog=_GIN_HELP + "\nStart with:\n" + commands_lib.COMMANDS["plan"].example,
        **{**_AS_WRITTEN, "formatter_class": parsing.GroupedHelp},
    )
    top.add_argument("--version", action="version", version=moe_peft.__version__)
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    more = {"plan": _add_json, "train": _add_distributed, "preflight": _add_preflight}
    for name, command in commands_lib.COMMANDS.items():
        sub = _add_settings(commands, name, command)
        more.get(name, lambda sub: None)(sub)
    for add in (_add_compare, _add_report, _add_convert, _add_aggregate, _add_data, _add_push):
        add(commands)
    _add_experiments(commands)
    listing.add_commands(commands)
    completion.add_command(commands)
    return top


def _add_json(sub: argparse.ArgumentParser, instead: str = "JSON instead of tables") -> None:
    sub.add_argument("--json", action="store_true", help=f"print {instead}")


def _add_folders(sub: argparse.ArgumentParser, out: str, default: str | None = None) -> None:
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a run")
    sub.add_argument("--out", default=default, metavar="FOLDER", help=out)


def _add_settings(commands, name: str, command: entry.Command) -> argparse.ArgumentParser:
    """A command, or verb of one, that takes settings from gin."""
    sub = commands.add_parser(
        name.split()[-1],
        help=command.help,
        description=command.help.capitalize() + ".",
        epilog=_GIN_HELP + "\nExamples:\n" + command.example,
        **_AS_WRITTEN,
    )
    flags.add(sub, name)
    sub.add_argument("--gin_file", action="append", default=[], metavar="FILE")
    sub.add_argument("--gin_search_paths", default="", metavar="A,B")
    return sub


def _add_distributed(sub: argparse.ArgumentParser) -> None:
    what = (
        "train in COUNT processes, of which this is the INDEX-th, from 0; 'auto' asks the "
        "surroundings (TPU pods, Slurm, Open MPI), 'off' trains alone. Default: the same in "
        "MOE_PEFT_DISTRIBUTED, else what a Slurm step, a TPU slice or a Kubernetes job says"
    )
    sub.add_argument("--distributed", metavar="HOST:PORT,COUNT,INDEX", help=what)
    wait = "how long to wait for the other processes (default: 300)"
    sub.add_argument("--distributed_timeout", type=int, default=300, metavar="SECONDS", help=wait)


def _add_preflight(sub: argparse.ArgumentParser) -> None:
    flag = sub.add_argument
    flag("--target", required=True, help="a TPU topology (v5e:4x4), slice (v4-256) or h100:COUNT")
    flag("--slices", type=int, default=1, help="so many of the TPU slices together (default: 1)")
    mesh = "sizes of data, fsdp and model (default: all devices along data), or auto: a rule "
    mesh += "chooses them, and micro-batches"
    flag("--mesh", default="", metavar="AXIS=N,...", help=mesh)
    program = "train (default), eval (scores choices, or exact match) or decode (answers in text, "
    program += "greedily unless --gin.preflight.decoding=@decoding.BeamSearch())"
    flag("--program", default="train", help=program)
    flag("--microbatches", type=int, default=1, help="parts of a batch (default: 1)")
    flag("--remat", default="full", help="computed again backwards: none, minimal, full (default)")
    flag("--price", type=float, help="of a chip and hour, to tell the cost of steps")
    flag("--search", action="store_true", help="try meshes, micro-batches, remat; rank what fits")
    quick = "compile with a TPU compiler's least effort: a third of the time or less, figures "
    quick += "some per cent higher"
    flag("--quick", action="store_true", help=quick)
    _add_json(sub)


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
            "*.safetensors, ours; --from reads tfew, too. What is there is detected.\nExamples:\n"
            "  moe-peft convert --from embedded:cldr_tiny --to hf:cldr_tiny\n"
            "  moe-peft convert results/cldr/lora --to peft:lora\n"
            "  moe-peft convert --from results/cldr/mhr --task 3 --to peft:task3\n"
            "  moe-peft convert --from results/cldr/lora --merge --to hf:merged\n"
            "  moe-peft convert --average a.safetensors b.safetensors --to soup.safetensors"
        ),
        **_AS_WRITTEN,
    )
    flag = sub.add_argument
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="source", metavar="PLACE", help="what to convert")
    what.add_argument("run", nargs="?", metavar="RUN", help="folder of a run, as --from")
    what.add_argument("--average", nargs="+", metavar="PLACE", help="adapters to average")
    flag("--to", required=True, metavar="PLACE", help="what to write")
    flag("--weights", metavar="0.5,...", help="of --average; default: equal ones")
    flag("--merge", action="store_true", help="fold the adapter into its backbone")
    flag("--task", type=int, metavar="ID", help="task of a task-routed adapter")
    flag("--member", metavar="TASK:SEED", help="run of an adaptation")
    flag("--step", type=int, help="checkpoint of a run; default: the newest")
    flag("--base", metavar="PLACE", help="backbone of an adapter that names none")
    flag("--dtype", choices=("float32", "bfloat16"), help="of what is written")
    layout = "layout of a model's layers in T5X and in our own files; default: as it is"
    flag("--scan_layers", action=argparse.BooleanOptionalAction, help=layout)
    flag("--t5x_layout", choices=("legacy", "orbax"), default="legacy", help="default: legacy")
    flag("--overwrite", action="store_true", help="replace what is at --to")
    flag("--seed", type=int, default=0, help="of the random batch")


def _add_push(commands) -> None:
    sub = commands.add_parser(
        "push",
        help="send an adapter folder, or a run as one, to the Hugging Face Hub",
        description="Sends an adapter folder that `moe-peft export` wrote, or the newest "
        "checkpoint of a run as such a folder, to the Hugging Face Hub.",
        epilog="Example:\n  moe-peft push results/mov me/mov --private",
        **_AS_WRITTEN,
    )
    flag = sub.add_argument
    flag("folder", metavar="FOLDER", help="adapter folder, or folder of a run")
    flag("repo", metavar="NAME/REPO", help="where; made if it is not there")
    flag("--private", action="store_true", help="refuse to send to a public repository")
    flag("--message", metavar="TEXT", help="of the commit")


def _add_compare(commands) -> None:
    sub = commands.add_parser(
        "compare",
        help="show evaluated or adapted runs side by side, as a table and a picture",
        description="Shows runs that `moe-peft eval` evaluated, or adaptations by `moe-peft "
        "adapt`, side by side.",
    )
    _add_folders(sub, "where to write table and picture", "results")


def _add_report(commands) -> None:
    sub = commands.add_parser(
        "report",
        help="draw what runs recorded: task routing, gradient alignment",
        description=(
            "Draws everything that the folders of runs have data for: weights of tasks and skills, "
            "a tree of tasks by routing, the course of routing, gradient alignment."
        ),
    )
    flag = sub.add_argument
    _add_folders(sub, "where to write pictures", "results")
    flag("--step", type=int, help="checkpoint to draw; default: the newest")
    group = "its first parenthesis is what a task is grouped by; default: the run's TASK_GROUP"
    flag("--group", metavar="REGEX", help=group)
    layers = "layers whose weights are drawn, such as 'decoder/layers_0/'; default: a few"
    flag("--layers", metavar="REGEX", help=layers)
    splits = "splits (heads) whose weights are drawn; default: four"
    flag("--splits", metavar="0,1,...", help=splits)


def _add_data(commands) -> None:
    data = commands.add_parser(
        "data",
        help="check, prepare and look at the data of benchmarks",
        description="Checks, prepares and shows the data that runs read.",
    )
    verbs = data.add_subparsers(dest="verb", metavar="verb", required=True)
    check = verbs.add_parser(
        "check",
        help="what is there, what is missing, what is damaged, what leaks",
        description=(
            "Reads all files of the benchmarks in a folder once and reports counts, hashes and "
            "findings by rule. Exits with 1 where the rules missing, damaged or leak found "
            "something; duplicate, count, hash and optional are for information. In rows of your "
            "own, it looks for the same questions, those of --eval_data among those to train on "
            "too, and, given --backbone or --vocabulary, for what is too long."
        ),
    )
    flag = check.add_argument
    folder = "as DATA_DIR: holds superni/, crossfit/, p3/, or some of them; or rows of your own"
    flag("folder", metavar="DIR|FILE", help=folder)
    several: dict[str, Any] = {"action": "append", "default": []}
    flag("--benchmark", metavar="NAME", help="only this; may be repeated", **several)
    flag("--ignore", metavar="RULE", help="do not fail by this rule; may be repeated", **several)
    flag("--no_hashes", action="store_true", help="do not hash files; half the reading")
    flags.add(check, "data check")
    _add_json(check)

    prepare = _add_settings(verbs, "data prepare", commands_lib.DATA_COMMANDS["data prepare"])
    flag = prepare.add_argument
    names = "mixture or task; default: MIXTURE, TARGET_MIXTURE and EVAL_MIXTURES"
    flag("names", nargs="*", metavar="NAME", help=names)
    flag("--splits", default="", metavar="A,B", help="default: all")
    flag("--processes", type=int, default=1, metavar="N")
    _add_json(prepare, "JSON")

    show = _add_settings(verbs, "data show", commands_lib.DATA_COMMANDS["data show"])
    flag = show.add_argument
    flag("name", metavar="NAME", help="task; mixture in the order of training; own file")
    flag("--split", default="train")
    flag("--count", type=int, default=3, metavar="N", help="examples; default: 3")
    flag("--start", type=int, default=0, metavar="N", help="examples to leave out")
    flag("--packed", action="store_true", help="the first row of packed training")
    flag("--all_ids", action="store_true", help="do not shorten lists of ids")
    _add_json(show, "JSON")


def _add_experiments(commands) -> None:
    sub = commands.add_parser(
        "experiments",
        help="list the rows of the papers' tables, their published values and what was checked",
        description="Lists the experiment files of the papers' tables, or checks them.",
    )
    flag = sub.add_argument
    flag("names", nargs="*", metavar="NAME", help="such as mhr/t0_xl or mov/3b/mov_10")
    flag("--paper", action="append", default=[], help="mhr, poly_s or mov")
    flag("--table", action="append", default=[], help="as printed (6), or its folder")
    flag("--size", action="append", default=[], help="770M, 3B or 11B")
    _add_json(sub, "JSON instead of a table")
    flag("--markdown", action="store_true", help="print the tables of the docs")
    check = "read all settings; count parameters at full size; run the two-minute versions"
    flag("--check", choices=("parse", "plan", "run"), help=check)
    flag("--shard", metavar="I/N", help="check part I of N only")
    flag("--again", action="store_true", help="repeat what was checked before")
    flag("--record", metavar="FILE", help="where outcomes are kept")
    flag("--results", default="results", metavar="FOLDER", help="full-size runs; default: results")
    two_minutes = "where two-minute versions run; default: %(default)s"
    flag("--folder", default="results/experiments", help=two_minutes)


def _add_aggregate(commands) -> None:
    sub = commands.add_parser(
        "aggregate",
        help="average answers on disk again: other groups, rules, metrics, intervals; no model",
        description=(
            "Averages the answers that `moe-peft eval` or `moe-peft adapt` left in folders. What "
            "is not given stays as it was evaluated."
        ),
    )
    flag = sub.add_argument
    _add_folders(sub, "where to write results.json and table.md")
    flag("--average", metavar="RULE", help="tasks, groups, pooled_groups or examples count equally")
    flag("--group", metavar="REGEX", help="its first parenthesis is what a task is reported under")
    flag("--metric", help="score answers in text by this metric")
    flag("--bootstrap", metavar="OVER", help="intervals over examples, templates or tasks")
    flag("--resamples", type=int, default=1000, help="of --bootstrap; default: 1000")
    flag("--seed", type=int, default=0, help="of --bootstrap; default: 0")
