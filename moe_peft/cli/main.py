"""The command line: `moe-peft plan | train | adapt | eval | infer | export | merge | ...`.

Only argument parsing happens in this module's own imports, so `--help` is instant. A command names
the gin configurable that is its entry point; everything that configurable takes comes from gin.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import os
import pathlib
import sys
from typing import Any

from moe_peft import errors
from moe_peft.cli import arguments as arguments_lib
from moe_peft.cli import commands, completion, flags, listing
from moe_peft.config import imports

USER_ERROR = errors.EXIT_CODE
INTERRUPTED = 130

configure = commands.configure  # for callers in Python

# They compute next to nothing, so they leave the accelerator to those who do.
_ON_CPU = ("plan", "report", "export", "merge", "convert", "aggregate", "push")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    A mistake in the settings or the surroundings (`errors.UserError`, a file system that refuses)
    is one line on standard error and code 2. Any other is our own and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    imports.add_working_directory()
    others = [a for a in arguments if not a.startswith("--gin.")]
    args = arguments_lib.parser().parse_args(others)
    args.gin_bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    # TensorFlow reads the input; its start-up notes would bury a one-line message.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.command in _ON_CPU:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.command == "preflight":
        from moe_peft.preflight import hardware

        hardware.without_devices(os.environ)
    skipped_before = _skipped()
    try:
        code = _run(args)
        if args.command != "data" or args.verb == "show":  # the other verbs tell it themselves
            _say_skipped(skipped_before)
        return code
    except BrokenPipeError:  # whoever read the output has seen enough, as in `moe-peft plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (errors.UserError, OSError) as error:
        from moe_peft.config import gin_files

        print(f"moe-peft {args.command}: {gin_files.one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"moe-peft {args.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _skipped() -> collections.Counter[tuple[str, str]]:
    """Bad rows that this process has skipped, by (file, reason)."""
    reader = sys.modules.get("moe_peft.data.bad_rows")
    return collections.Counter(reader.skipped() if reader else {})


def _say_skipped(before: collections.Counter[tuple[str, str]]) -> None:
    """Prints how many bad rows were skipped since, if any were."""
    found = _skipped() - before
    if found:
        print(f"{sys.modules['moe_peft.data.bad_rows'].summary(found)}.", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    name = f"{args.command} {args.verb}" if args.command == "data" else args.command
    if name in commands.ALL:
        code = _RUN.get(name, _compute)(_entry_point(name, args), args)
    elif args.gin_bindings:
        raise errors.UserError(f"--gin.{args.gin_bindings[0]}: no settings are taken from gin.")
    else:
        code = _RUN[name](args)
    return code or 0


def _entry_point(name: str, args: argparse.Namespace) -> Callable:
    """The configured entry point of a command, ready to be called."""
    command, given = commands.ALL[name], flags.given(name, args)
    files, bindings = [*given.files, *args.gin_file], [*given.bindings, *args.gin_bindings]
    if not (files or bindings or command.reads_a_part):
        raise errors.UserError(f"no settings given. For example:\n{command.example}")
    if name not in _RUN:
        _join_processes(args)
    return configure(name, files, bindings, args.gin_search_paths, flags.of(name), given.statements)


def _join_processes(args: argparse.Namespace) -> None:
    """Readies the processor and joins the other processes of a run, if there are any."""
    from moe_peft.runtime import host_memory, processes, tensorflow_logs

    host_memory.run_programs_inline()
    cluster = processes.find(getattr(args, "distributed", None), os.environ)
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # which jax sets where there is no TPU
        tensorflow_logs.answer_libtpu(os.environ)
    if cluster is None:
        return
    if args.command != "train":
        raise errors.UserError(
            f"{args.command} works in one process, and {cluster.found_in} starts several. Start it "
            f"once, or set {processes.VARIABLE}=off."
        )
    processes.join(cluster, args.distributed_timeout)


# Commands that take settings: what happens with their entry point.


def _compute(entry_point: Callable, args: argparse.Namespace) -> None:
    entry_point()


def _write(entry_point: Callable, args: argparse.Namespace) -> None:
    _say_written([entry_point()])


def _plan(entry_point: Callable, args: argparse.Namespace) -> None:
    from moe_peft.preflight import plan

    plan.show(entry_point(), as_json=args.json)


def _preflight(entry_point: Callable, args: argparse.Namespace) -> int:
    from moe_peft.preflight import command as command_lib
    from moe_peft.preflight import hardware

    return command_lib.run(
        entry_point(),
        hardware.find_target(args.target, args.slices),
        **_flags(args, "program", "mesh", "microbatches", "remat", "price"),
        is_search=args.search,
        is_quick=args.quick,
        as_json=args.json,
    )


def _data_prepare(entry_point: Callable, args: argparse.Namespace) -> None:
    from moe_peft.cli import data_prepare

    splits = [split for split in args.splits.split(",") if split]
    data_prepare.run(entry_point, args.names, splits, args.processes, args.json)


def _data_show(entry_point: Callable, args: argparse.Namespace) -> None:
    from moe_peft.cli import data_show

    found = entry_point(**_flags(args, "split", "count", "start", "packed"))
    data_show.show(found, args.json, args.all_ids)


# Commands that take flags only.


def _data_check(args: argparse.Namespace) -> int:
    from moe_peft.runtime import tensorflow_logs

    with tensorflow_logs.silenced():
        from moe_peft.cli import data_check
    what = (args.folder, args.benchmark, not args.no_hashes, args.ignore, args.json)
    return data_check.run(*what, _flags(args, *(flag[2:] for flag in flags.of("data check"))))


def _completion(args: argparse.Namespace) -> None:
    print(completion.script(arguments_lib.parser(), args.shell))


def _compare(args: argparse.Namespace) -> None:
    """Shows folders of adaptations as parameters against score, others as tables by group."""
    from moe_peft.evaluation import table
    from moe_peft.reports import compare, compare_adapted

    adapted = [folder for folder in args.folders if compare_adapted.is_adaptation(folder)]
    evaluated = [folder for folder in args.folders if folder not in adapted]
    for runs in compare.load(evaluated).values():
        table.show(runs)
        _say_written(compare.write(runs, args.out))
    for mixture, (title, rows) in compare_adapted.load(adapted).items():
        compare_adapted.show(rows, title)
        place = os.path.join(args.out, f"{mixture}_adapted")
        _say_written(compare_adapted.write(rows, title, place))


def _convert(args: argparse.Namespace) -> None:
    from moe_peft.convert import convert

    options = _flags(args, *(field.name for field in dataclasses.fields(convert.Options)))
    if args.average is not None and len(args.average) < 2:
        raise errors.UserError("--average takes at least two adapters, got 1.")
    if args.weights is not None:
        options["weights"] = _numbers("--weights", args.weights, float)
    sources = args.average or [args.source or args.run]
    _say_written([convert.convert(sources, args.to, convert.Options(**options))])


def _push(args: argparse.Namespace) -> None:
    from moe_peft.cli import push

    print(f"sent to {push.push(args.folder, args.repo, args.private, args.message)}")


def _report(args: argparse.Namespace) -> None:
    from moe_peft.reports import run_report

    splits = None if args.splits is None else _numbers("--splits", args.splits, int)
    options = _flags(args, "step", "group", "layers")
    _say_written(run_report.write(args.folders, args.out, splits=splits, **options))


def _experiments(args: argparse.Namespace) -> int:
    """Lists or checks experiments; 1 if one of those checked fails."""
    from moe_peft.experiments import checks as checks_lib
    from moe_peft.experiments import listing
    from moe_peft.experiments import record as record_lib

    found = listing.select(args.names, args.paper, args.table, args.size)
    if args.shard:
        found = listing.shard(found, args.shard)
    record = pathlib.Path(args.record) if args.record else record_lib.default_record()
    if args.markdown:
        print(listing.markdown(found))
        return 0
    if args.check:
        folder = pathlib.Path(args.folder)
        rows = checks_lib.check(found, args.check, record, folder, args.again, configure=configure)
    else:
        rows = record_lib.rows(found, record, pathlib.Path(args.results))
    listing.show(rows, args.json)
    return int(bool(args.check) and any(" fails: " in row.state for row in rows))


def _aggregate(args: argparse.Namespace) -> None:
    from moe_peft.cli import aggregate
    from moe_peft.evaluation import bootstrap

    sampling = _flags(args, "resamples", "seed")
    how = args.bootstrap and bootstrap.Bootstrap(args.bootstrap, **sampling)
    changes = aggregate.Changes(args.average, args.group, args.metric, how)
    for folder in map(pathlib.Path, args.folders):
        out = args.out and pathlib.Path(args.out)
        if out is not None and len(args.folders) > 1:
            out = out / folder.name
        aggregate.aggregate(folder, changes, out)


def _flags(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _numbers(flag: str, text: str, kind: type) -> list:
    """Returns the numbers of a flag like "0,1,2"."""
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise errors.UserError(
            f"{flag} is {text!r}; expected numbers with commas between them, such as 0,1,2."
        ) from None


def _say_written(paths: Iterable) -> None:
    for path in paths:
        print(f"wrote {path}")


# By name of the command; those that take settings and are not here compute.
_RUN = {
    "plan": _plan,
    "preflight": _preflight,
    "export": _write,
    "merge": _write,
    "data prepare": _data_prepare,
    "data show": _data_show,
    "data check": _data_check,
    **listing.RUN,
    "completion": _completion,
    "compare": _compare,
    "convert": _convert,
    "push": _push,
    "report": _report,
    "experiments": _experiments,
    "aggregate": _aggregate,
}


if __name__ == "__main__":
    sys.exit(main())
