"""The command line: `moe-peft plan | train | adapt | eval | infer | export | merge | ...`.

Only argument parsing happens in this module's own imports, so `--help` is instant. A command names
the gin configurable that is its entry point; everything that configurable takes comes from gin.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import os
import sys

import moe_peft
from moe_peft import errors

USER_ERROR = 2
INTERRUPTED = 130

_GIN_HELP = """\
Settings come from gin files, as in T5X:
  --gin_file FILE           read FILE; repeat it, a later file wins
  --gin.NAME=VALUE          set one value; it wins over files (macros: --gin.TRAIN_STEPS=100,
                            parameters: --gin.mov.num_experts=20)
  --gin_search_paths A,B    also look for files in these folders
FILE is looked up in the working directory, in the search paths, then among the files that come with
the package (models/ methods/ data/ runs/ experiments/), which `moe-peft files` lists.
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
      entry_point: the gin configurable that is called without arguments.
      help: one line.
      example: complete command lines that work.
      modules: imported before any gin file is read, the entry point's module last.
      defaults: gin statements read before any file.
    """

    entry_point: str
    help: str
    example: str
    modules: tuple[str, ...]
    defaults: tuple[str, ...] = ()


COMMANDS = {
    "plan": Command(
        entry_point="plan",
        help="show what would be adapted and trained, without weights",
        example=(
            "  moe-peft plan --gin_file models/t5_1_1_xl.gin --gin_file methods/mov.gin\n"
            "  moe-peft plan --gin_file experiments/cldr/mov.gin --json"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.analysis.plan"),
        defaults=(
            "NOMINAL_SIZE = None",
            "TARGET_METHOD = None",
            "plan.target_method = %TARGET_METHOD",
            "plan.model = %MODEL",
            "plan.method = %METHOD",
            "plan.nominal_size = %NOMINAL_SIZE",
        ),
    ),
    "train": Command(
        entry_point="train",
        help="adapt a frozen backbone, or go on where an earlier run stopped",
        example=(
            "  moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov\n"
            "  moe-peft train --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=/tmp/try "
            "--gin.TRAIN_STEPS=20"
        ),
        modules=("moe_peft.training.loop",),
    ),
    "preflight": Command(
        entry_point="preflight",
        help="compile the train step for TPUs or GPUs that are not here; say whether it fits",
        example=(
            "  moe-peft preflight --gin_file experiments/mov/3b/mov_10.gin --target v5e:4x4 "
            "--mesh model=4\n"
            "  moe-peft preflight --gin_file experiments/mov/11b/mov_30.gin --target v5e-256 "
            "--search"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.commands.preflight"),
        defaults=(
            "FROZEN_DTYPE = 'bfloat16'",
            "preflight.model = %MODEL",
            "preflight.method = %METHOD",
            "preflight.optimizer = %OPTIMIZER",
            "preflight.feature_lengths = %FEATURE_LENGTHS",
            "preflight.batch_size = %BATCH_SIZE",
            "preflight.frozen_dtype = %FROZEN_DTYPE",
        ),
    ),
    "adapt": Command(
        entry_point="adapt",
        help="adapt a multi-task run, or the bare backbone, to new tasks with a few examples",
        example=(
            "  moe-peft adapt --gin_file experiments/cldr/fewshot/lora.gin "
            "--gin.MODEL_DIR=results/fewshot/lora \\\n"
            "    --gin.SOURCE=results/cldr/lora"
        ),
        modules=("moe_peft.training.adapt",),
    ),
    "eval": Command(
        entry_point="evaluate",
        help="evaluate a trained run, or the bare backbone, over tasks and templates",
        example=(
            "  moe-peft eval --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov\n"
            "  moe-peft eval --gin_file experiments/cldr/frozen.gin --gin.MODEL_DIR=results/frozen"
        ),
        modules=("moe_peft.evaluation.evaluate",),
    ),
    "infer": Command(
        entry_point="infer",
        help="write answers to the lines of a text file",
        example=(
            "  moe-peft infer --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov \\\n"
            "    --gin.INPUTS=questions.txt --gin.OUTPUTS=answers.jsonl"
        ),
        modules=("moe_peft.evaluation.infer",),
    ),
    "export": Command(
        entry_point="export",
        help="write the trained parameters of a run as one safetensors file",
        example=(
            "  moe-peft export --gin.MODEL_DIR=results/mov --gin.OUTPUTS=mov.safetensors\n"
            "  moe-peft export --gin_file experiments/cldr/mov.gin --gin.MODEL_DIR=results/mov "
            "--gin.OUTPUTS=mov.safetensors"
        ),
        modules=("moe_peft.commands.export",),
        defaults=("export.model_dir = %MODEL_DIR", "export.path = %OUTPUTS"),
    ),
    "merge": Command(
        entry_point="merge",
        help="fold a run's adapters into the network's weights, for one task, as a backbone file",
        example=(
            "  moe-peft merge --gin_file experiments/cldr/lora.gin --gin.MODEL_DIR=results/lora "
            "\\\n    --gin.OUTPUTS=merged.safetensors\n"
            "  moe-peft merge --gin_file results/mhr/config.gin --gin.TASK=3 "
            "--gin.OUTPUTS=merged.safetensors"
        ),
        modules=("moe_peft.models", "moe_peft.methods", "moe_peft.commands.merge"),
        defaults=(
            "TASK = None",
            "FROZEN_DTYPE = 'float32'",
            "merge.model = %MODEL",
            "merge.method = %METHOD",
            "merge.backbone = %BACKBONE",
            "merge.model_dir = %MODEL_DIR",
            "merge.path = %OUTPUTS",
            "merge.task = %TASK",
            "merge.frozen_dtype = %FROZEN_DTYPE",
        ),
    ),
}


# Verbs of `moe-peft data` that take settings.
_DATA_MODULES = ("moe_peft.models", "moe_peft.methods")  # what files of an experiment name
_DATA_DEFAULTS = (
    "include 'data/files.gin'",
    "MIXTURE = None",
    "TARGET_MIXTURE = None",
    "EVAL_MIXTURES = ()",
)
DATA_COMMANDS = {
    "data prepare": Command(
        entry_point="data_prepare",
        help="make the caches of token ids beforehand, in parallel; goes on where it stopped",
        example=(
            "  moe-peft data prepare --gin_file data/p3.gin --gin.DATA_DIR=/data "
            "--gin.VOCABULARY=/models/t5/spiece.model --processes 8\n"
            "  moe-peft data prepare p3_t0 p3_heldout --gin.DATA_DIR=embedded:samples "
            "--gin.VOCABULARY=bytes"
        ),
        modules=(*_DATA_MODULES, "moe_peft.commands.data_prepare"),
        defaults=(
            *_DATA_DEFAULTS,
            "data_prepare.mixtures = (%MIXTURE, %TARGET_MIXTURE)",
            "data_prepare.eval_mixtures = %EVAL_MIXTURES",
        ),
    ),
    "data show": Command(
        entry_point="data_show",
        help="print examples as the model sees them, with token ids and lengths",
        example=(
            "  moe-peft data show cldr_month_de --split validation\n"
            "  moe-peft data show superni_train --gin_file samples/superni.gin --count 2\n"
            "  moe-peft data show p3_t0 --gin_file samples/p3.gin --packed"
        ),
        modules=(*_DATA_MODULES, "moe_peft.commands.data_show"),
        defaults=(
            *_DATA_DEFAULTS,
            "FEATURE_LENGTHS = None",
            "data_show.feature_lengths = %FEATURE_LENGTHS",
        ),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The argument parser; `--gin.NAME=VALUE` is taken out before it runs."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="moe-peft",
        description="Trains mixtures of tiny adapters on a frozen T5.",
        epilog=_GIN_HELP + "\nStart with:\n" + COMMANDS["plan"].example,
        formatter_class=raw,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=moe_peft.__version__)
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
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
    commands.add_parser("files", help="list the gin files that come with the package")
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
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="sizes of data, fsdp and model (default: all devices along data)",
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
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _preflight(experiment, args: argparse.Namespace) -> int:
    from moe_peft.commands import preflight
    from moe_peft.partitioning import targets

    return preflight.run(
        experiment,
        targets.find(args.target),
        mesh=args.mesh,
        microbatches=args.microbatches,
        remat=args.remat,
        price=args.price,
        is_search=args.search,
        as_json=args.json,
    )


def _add_settings(commands, name: str, command: Command) -> argparse.ArgumentParser:
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

    prepare = _add_settings(verbs, "data prepare", DATA_COMMANDS["data prepare"])
    prepare.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="mixture or task; default: MIXTURE, TARGET_MIXTURE and EVAL_MIXTURES",
    )
    prepare.add_argument("--splits", default="", metavar="A,B", help="default: all")
    prepare.add_argument("--processes", type=int, default=1, metavar="N")
    prepare.add_argument("--json", action="store_true", help="print JSON")

    show = _add_settings(verbs, "data show", DATA_COMMANDS["data show"])
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    A mistake in the settings or the surroundings (`errors.UserError`, a file system that refuses)
    is one line on standard error and code 2. Anything else is our own mistake and keeps its
    traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    gin_bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    arguments = [a for a in arguments if not a.startswith("--gin.")]
    args = parser().parse_args(arguments)
    # TensorFlow reads the input; its start-up notes would bury a one-line message.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.command in ("plan", "report", "export", "merge", "convert", "aggregate"):
        # They compute next to nothing, so they leave the accelerator to those who do.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.command == "preflight":
        from moe_peft.partitioning import surroundings

        surroundings.without_devices(os.environ)
    try:
        code = _run(args, gin_bindings)
        if args.command != "data" or args.verb == "show":  # the other verbs tell it themselves
            _say_skipped()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough, as in `moe-peft plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (errors.UserError, OSError) as error:
        from moe_peft import gin_utils

        print(f"moe-peft {args.command}: {gin_utils.one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"moe-peft {args.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _say_skipped() -> None:
    """Prints how many bad rows were skipped, if any were."""
    reader = sys.modules.get("moe_peft.data.bad_rows")
    if reader is not None and reader.skipped():
        print(f"{reader.summary(reader.skipped())}.", file=sys.stderr)


def _run(args: argparse.Namespace, gin_bindings: Sequence[str]) -> int:
    from moe_peft import gin_utils

    if args.command == "files":
        folder = gin_utils.packaged_folder()
        print("\n".join(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.gin"))))
        return 0

    if args.command == "compare":
        _compare(args.folders, args.out)
        return 0

    if args.command == "report":
        _report(args)
        return 0

    if args.command == "convert":
        _convert(args)
        return 0

    if args.command == "data":
        return _data(args, gin_bindings)

    if args.command == "experiments":
        return _experiments(args)

    if args.command == "aggregate":
        _aggregate(args)
        return 0

    command = COMMANDS[args.command]
    if not args.gin_file and not gin_bindings:
        raise errors.UserError(f"no settings given. For example:\n{command.example}")
    _join(args)
    entry_point = configure(args.command, args.gin_file, gin_bindings, args.gin_search_paths)
    if args.command == "plan":
        from moe_peft.analysis import plan

        plan.show(entry_point(), as_json=args.json)
        return 0
    if args.command == "preflight":
        return _preflight(entry_point(), args)
    result = entry_point()
    if args.command in ("export", "merge"):
        print(f"wrote {result}")
    return 0


def _join(args: argparse.Namespace) -> None:
    """Joins the other processes of a run, if there are any."""
    from moe_peft.partitioning import hosts

    if args.command in ("plan", "preflight", "export", "merge"):
        return
    cluster = hosts.find(getattr(args, "distributed", None), os.environ)
    if cluster is not None and args.command != "train":
        raise errors.UserError(
            f"{args.command} works in one process, and {cluster.found_in} starts several. Start it "
            f"once, or set {hosts.VARIABLE}=off."
        )
    if cluster is not None:
        hosts.join(cluster, args.distributed_timeout)


def _compare(folders: Sequence[str], out: str) -> None:
    """Shows folders of adaptations as parameters against score, others as tables by group."""
    from moe_peft.analysis import pareto, report

    adapted = [folder for folder in folders if pareto.is_adaptation(folder)]
    evaluated = [folder for folder in folders if folder not in adapted]
    for runs in report.load(evaluated).values():
        report.show(runs)
        _say_written(report.write(runs, out))
    for mixture, (title, rows) in pareto.load(adapted).items():
        pareto.show(rows, title)
        _say_written(pareto.write(rows, title, os.path.join(out, f"{mixture}_adapted")))


def _convert(args: argparse.Namespace) -> None:
    from moe_peft.commands import convert

    options = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(convert.Options)
    }
    if args.average is not None and len(args.average) < 2:
        raise errors.UserError("--average takes at least two adapters, got 1.")
    if args.weights is not None:
        options["weights"] = _numbers("--weights", args.weights, float)
    place = convert.convert(args.average or [args.source], args.to, convert.Options(**options))
    print(f"wrote {place}")


def _numbers(flag: str, text: str, kind: type) -> list:
    """Returns the numbers of a flag like "0,1,2"."""
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise errors.UserError(
            f"{flag} is {text!r}; expected numbers with commas between them, such as 0,1,2."
        ) from None


def _report(args: argparse.Namespace) -> None:
    from moe_peft.analysis import run_report

    splits = None if args.splits is None else _numbers("--splits", args.splits, int)
    _say_written(
        run_report.write(
            args.folders,
            args.out,
            step=args.step,
            group=args.group,
            layers=args.layers,
            splits=splits,
        )
    )


def _data(args: argparse.Namespace, gin_bindings: Sequence[str]) -> int:
    from moe_peft import quiet

    if args.verb == "prepare":
        prepare = configure("data prepare", args.gin_file, gin_bindings, args.gin_search_paths)
        from moe_peft.commands import data_prepare

        splits = [split for split in args.splits.split(",") if split]
        call = functools.partial(prepare, names=args.names, splits=splits, processes=args.processes)
        data_prepare.show(*data_prepare.timed(call), args.json)
        return 0
    if args.verb == "show":
        show = configure("data show", args.gin_file, gin_bindings, args.gin_search_paths)
        from moe_peft.commands import data_show

        wanted = ("name", "split", "count", "start", "packed")
        found = show(**{name: getattr(args, name) for name in wanted})
        printed = data_show.show_packed if args.packed else data_show.show
        printed(found, args.json, args.all_ids)
        return 0
    with quiet.importing():
        from moe_peft.commands import data_check
    return data_check.run(args.folder, args.benchmark, not args.no_hashes, args.ignore, args.json)


def _experiments(args: argparse.Namespace) -> int:
    """Lists or checks experiments; 1 if one of those checked fails."""
    import pathlib

    from moe_peft.commands import experiment_checks, experiment_record, experiments

    found = experiments.select(args.names, args.paper, args.table, args.size)
    if args.shard:
        found = experiments.shard(found, args.shard)
    record = pathlib.Path(args.record) if args.record else experiment_record.default_record()
    if args.markdown:
        print(experiments.markdown(found))
        return 0
    if args.check:
        folder = pathlib.Path(args.folder)
        rows = experiment_checks.check(found, args.check, record, folder, args.again)
    else:
        rows = experiment_record.rows(found, record, pathlib.Path(args.results))
    experiments.show(rows, args.json)
    return int(bool(args.check) and any(" fails: " in row.state for row in rows))


def _aggregate(args: argparse.Namespace) -> None:
    import pathlib

    from moe_peft.commands import aggregate
    from moe_peft.evaluation import bootstrap

    how = args.bootstrap and bootstrap.Bootstrap(
        args.bootstrap, resamples=args.resamples, seed=args.seed
    )
    changes = aggregate.Changes(args.average, args.group, args.metric, how)
    for folder in map(pathlib.Path, args.folders):
        out = args.out and pathlib.Path(args.out)
        if out is not None and len(args.folders) > 1:
            out = out / folder.name
        aggregate.aggregate(folder, changes, out)


def _say_written(paths) -> None:
    for path in paths:
        print(f"wrote {path}")


def configure(
    name: str,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    gin_search_paths: str = "",
):
    """Reads and checks the settings of the command `name`; returns its entry point, to be called.

    Raises:
      UserError: for the first mistake, before anything is computed.
    """
    import gin

    from moe_peft import gin_checks, gin_utils

    every = {**COMMANDS, **DATA_COMMANDS}
    command = every[name]
    gin_utils.import_modules(command.modules)
    search_paths = [path for path in gin_search_paths.split(",") if path]
    load = lambda bindings: gin_utils.load(gin_files, bindings, search_paths, command.defaults)
    config = load(gin_bindings)
    backbone = config.macro("BACKBONE")
    if name == "plan" and backbone is not None and isinstance(backbone.value, str):
        # Optional, unlike for the commands that load it: a plan needs no weights.
        config = load([*gin_bindings, "plan.backbone=%BACKBONE"])
    entry_points = [other.entry_point for other in every.values()]
    gin_checks.check(
        config,
        command.entry_point,
        entry_points,
        gin_utils.CALLED_BY_LIBRARY,
        is_partial=name in DATA_COMMANDS,
    )
    for binding in gin_checks.obsolete(config, entry_points, gin_utils.CALLED_BY_LIBRARY):
        config.forget(binding)
    return gin.get_configurable(command.entry_point)


if __name__ == "__main__":
    sys.exit(main())
