"""The command line: `moe-peft plan | train | adapt | eval | infer | export | merge | ...`.

Only argument parsing happens in this module's own imports, so `--help` is instant. A command names
the gin configurable that is its entry point; everything that configurable takes comes from gin.
"""

import argparse
import collections
from collections.abc import Sequence
import dataclasses
import functools
import os
import sys

from moe_peft import errors
from moe_peft.cli import arguments as arguments_lib
from moe_peft.cli import commands

USER_ERROR = errors.EXIT_CODE
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    A mistake in the settings or the surroundings (`errors.UserError`, a file system that refuses)
    is one line on standard error and code 2. Anything else is our own mistake and keeps its
    traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    gin_bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    arguments = [a for a in arguments if not a.startswith("--gin.")]
    args = arguments_lib.parser().parse_args(arguments)
    # TensorFlow reads the input; its start-up notes would bury a one-line message.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.command in ("plan", "report", "export", "merge", "convert", "aggregate"):
        # They compute next to nothing, so they leave the accelerator to those who do.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.command == "preflight":
        from moe_peft.preflight import hardware

        hardware.without_devices(os.environ)
    skipped_before = _skipped()
    try:
        code = _run(args, gin_bindings)
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


def _run(args: argparse.Namespace, gin_bindings: Sequence[str]) -> int:
    if args.command == "files":
        from moe_peft.config import gin_files

        folder = gin_files.packaged_folder()
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gin"))
        print(folder if args.folder else "\n".join(found))
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

    command = commands.COMMANDS[args.command]
    if not args.gin_file and not gin_bindings:
        raise errors.UserError(f"no settings given. For example:\n{command.example}")
    _set_up(args)
    entry_point = configure(args.command, args.gin_file, gin_bindings, args.gin_search_paths)
    if args.command == "plan":
        from moe_peft.preflight import plan

        plan.show(entry_point(), as_json=args.json)
        return 0
    if args.command == "preflight":
        return _preflight(entry_point(), args)
    result = entry_point()
    if args.command in ("export", "merge"):
        print(f"wrote {result}")
    return 0


def _set_up(args: argparse.Namespace) -> None:
    """Readies the processor and joins the other processes of a run, if there are any."""
    if args.command in ("plan", "preflight", "export", "merge"):
        return
    from moe_peft.runtime import host_memory, processes

    host_memory.run_programs_inline()
    cluster = processes.find(getattr(args, "distributed", None), os.environ)
    if cluster is not None and args.command != "train":
        raise errors.UserError(
            f"{args.command} works in one process, and {cluster.found_in} starts several. Start it "
            f"once, or set {processes.VARIABLE}=off."
        )
    if cluster is not None:
        processes.join(cluster, args.distributed_timeout)


def _preflight(experiment, args: argparse.Namespace) -> int:
    from moe_peft.preflight import command as command_lib
    from moe_peft.preflight import hardware

    return command_lib.run(
        experiment,
        hardware.find_target(args.target, args.slices),
        program=args.program,
        mesh=args.mesh,
        microbatches=args.microbatches,
        remat=args.remat,
        price=args.price,
        is_search=args.search,
        is_quick=args.quick,
        as_json=args.json,
    )


def _compare(folders: Sequence[str], out: str) -> None:
    """Shows folders of adaptations as parameters against score, others as tables by group."""
    from moe_peft.evaluation import table
    from moe_peft.reports import compare, compare_adapted

    adapted = [folder for folder in folders if compare_adapted.is_adaptation(folder)]
    evaluated = [folder for folder in folders if folder not in adapted]
    for runs in compare.load(evaluated).values():
        table.show(runs)
        _say_written(compare.write(runs, out))
    for mixture, (title, rows) in compare_adapted.load(adapted).items():
        compare_adapted.show(rows, title)
        _say_written(compare_adapted.write(rows, title, os.path.join(out, f"{mixture}_adapted")))


def _convert(args: argparse.Namespace) -> None:
    from moe_peft.convert import convert

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
    from moe_peft.reports import run_report

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
    from moe_peft.runtime import tensorflow_logs

    if args.verb == "prepare":
        prepare = configure("data prepare", args.gin_file, gin_bindings, args.gin_search_paths)
        from moe_peft.cli import data_prepare

        splits = [split for split in args.splits.split(",") if split]
        call = functools.partial(prepare, names=args.names, splits=splits, processes=args.processes)
        data_prepare.show(*data_prepare.timed(call), args.json)
        return 0
    if args.verb == "show":
        show = configure("data show", args.gin_file, gin_bindings, args.gin_search_paths)
        from moe_peft.cli import data_show

        wanted = ("name", "split", "count", "start", "packed")
        found = show(**{name: getattr(args, name) for name in wanted})
        printed = data_show.show_packed if args.packed else data_show.show
        printed(found, args.json, args.all_ids)
        return 0
    with tensorflow_logs.importing():
        from moe_peft.cli import data_check
    return data_check.run(args.folder, args.benchmark, not args.no_hashes, args.ignore, args.json)


def _experiments(args: argparse.Namespace) -> int:
    """Lists or checks experiments; 1 if one of those checked fails."""
    import pathlib

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
    import pathlib

    from moe_peft.cli import aggregate
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

    from moe_peft.config import checks
    from moe_peft.config import gin_files as config_gin_files

    every = {**commands.COMMANDS, **commands.DATA_COMMANDS}
    command = every[name]
    config_gin_files.import_modules(command.modules)
    search_paths = [path for path in gin_search_paths.split(",") if path]
    load = lambda bindings: config_gin_files.load(
        gin_files, bindings, search_paths, command.defaults
    )
    config = load(gin_bindings)
    backbone = config.macro("BACKBONE")
    if name == "plan" and backbone is not None and isinstance(backbone.value, str):
        # Optional, unlike for the commands that load it: a plan needs no weights.
        config = load([*gin_bindings, "plan.backbone=%BACKBONE"])
    entry_points = [other.entry_point for other in every.values()]
    checks.check(
        config,
        command.entry_point,
        entry_points,
        config_gin_files.CALLED_BY_LIBRARY,
        is_partial=name in commands.DATA_COMMANDS,
    )
    for binding in checks.obsolete(config, entry_points, config_gin_files.CALLED_BY_LIBRARY):
        config.forget(binding)
    return gin.get_configurable(command.entry_point)


if __name__ == "__main__":
    sys.exit(main())
