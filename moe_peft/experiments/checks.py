"""Checks of experiments: their settings, their counts, their two-minute versions.

Two-minute versions run one after another in a process beside this one, so that none can end the
check, and outcomes are recorded at once: a check resumes, and may be divided over nights.
"""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import os
import pathlib
import re
import sys
import threading
import time
from typing import Any, TextIO

from moe_peft import errors
from moe_peft.config import gin_files
from moe_peft.experiments import files
from moe_peft.experiments import record as record_lib


def check(
    found: Sequence[files.Experiment],
    level: str,
    record: pathlib.Path,
    folder: pathlib.Path,
    is_again: bool = False,
) -> list[record_lib.Row]:
    """Checks experiments one after another up to a level; returns all their rows.

    Args:
      found: the experiments.
      level: "parse", "plan" or "run"; lower ones come first.
      record: outcomes go there at once; those that count and are "ok" are not repeated.
      folder: runs of two-minute versions go there, and their logs.
      is_again: repeats everything.
    """
    wanted = record_lib.LEVELS[: record_lib.LEVELS.index(level) + 1]
    left = [
        row.experiment
        for row in record_lib.rows(found, record)
        if is_again or any(row.record.get(each) != record_lib.OK for each in wanted)
    ]
    if len(left) < len(found):
        _say(f"{len(found) - len(left)} of {len(found)} were checked before")
    start = time.monotonic()
    with Workers() as workers:
        for number, experiment in enumerate(left, start=1):
            old = {} if is_again else record_lib.rows([experiment], record)[0].record
            outcome = {}
            for each in wanted:
                if old.get(each) != record_lib.OK:
                    outcome |= _checked(each, experiment, record, folder, workers)
                    if outcome[each] != record_lib.OK:
                        break
            record_lib.keep(record, experiment, outcome)
            state = record_lib.rows([experiment], record)[0].state
            spent = time.monotonic() - start
            to_go = spent / number * (len(left) - number) / 60
            _say(f"[{number}/{len(left)}] {experiment.name}: {state}; {to_go:.0f} min left")
    return record_lib.rows(found, record)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _checked(
    level: str,
    experiment: files.Experiment,
    record: pathlib.Path,
    folder: pathlib.Path,
    workers: "Workers",
) -> dict[str, Any]:
    try:
        if level == "run":
            return _run(experiment, record, folder, workers)
        {"parse": parse, "plan": plan}[level](experiment)
    except errors.UserError as error:
        return {level: gin_files.one_line(error)}
    return {level: record_lib.OK}


def _run(
    experiment: files.Experiment,
    record: pathlib.Path,
    folder: pathlib.Path,
    workers: "Workers",
) -> dict[str, Any]:
    """Runs the two-minute version, unless one with the very same settings has run.

    Rows of different sizes often differ in nothing on the samples.
    """
    made = {"run": record_lib.OK, "settings_on_samples": settings_on_samples(experiment)}
    for name, entry in record_lib.read(record).items():
        is_first = "ran_as" not in entry and name != experiment.name
        if is_first and made.items() <= entry.items():
            return {**made, "ran_as": name}
    start = time.monotonic()
    if problem := workers.run(experiment.name, folder):
        made["run"] = problem
    return {**made, "seconds": round(time.monotonic() - start)}


def settings_on_samples(experiment: files.Experiment) -> str:
    """A digest of all settings of the two-minute version but the folders of its runs."""
    from moe_peft.cli import main

    root = pathlib.Path("results")
    digest = hashlib.sha256()
    for line in experiment.two_minutes(root):
        main.configure(line.command, line.gin_files, line.bindings)
        text = re.sub(r"NOMINAL_SIZE = \d+\n", "", gin_files.resolved_text())
        for number, name in enumerate(filter(None, (experiment.name, experiment.after))):
            text = text.replace(str(files.load(name).folder(root)), f"run {number}")
        digest.update(f"{line.command}\n{text}".encode())
    return digest.hexdigest()[:12]


def parse(experiment: files.Experiment) -> None:
    """Reads the settings of every command, at full size and on the samples."""
    from moe_peft.cli import main

    lines = (*experiment.commands, *experiment.two_minutes(pathlib.Path("results")))
    for line in lines:
        main.configure(line.command, line.gin_files, line.bindings)


def plan(experiment: files.Experiment):
    """Counts parameters at full size, from shapes, and operations; returns the plan.

    Raises:
      UserError: a count is not the one that the file's head gives.
    """
    from moe_peft.cli import main
    from moe_peft.preflight import operations

    found = main.configure("plan", [experiment.gin_file], ["T5Config.scan_layers=True"])()
    many, is_full = experiment.trainable[0], "moves all" in experiment.hardware
    if many and not is_full:
        _compare(experiment, "parameters train", f"{many:,}", f"{found.trainable:,}")
    if experiment.operations:
        counted = operations.of_settings(is_full=is_full)
        _compare(experiment, "operations", f"{experiment.operations:.1e}", f"{counted:.1e}")
    return found


def _compare(experiment: files.Experiment, what: str, said: str, counted: str) -> None:
    if said != counted:
        raise errors.UserError(
            f"{experiment.gin_file}: its head says {said} {what}, counted are {counted}."
        )


class Workers:
    """A process beside this one that runs two-minute versions, and another after it if it dies."""

    _RUNS = 12  # of one process: what it compiled stays in memory

    def __init__(self):
        """Starts nothing yet."""
        self._pool = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def run(self, name: str, folder: pathlib.Path) -> str | None:
        """Runs a two-minute version; returns what went wrong, in a line, or None."""
        import concurrent.futures
        from concurrent.futures import process
        import multiprocessing

        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_prepare_worker,
                initargs=(folder,),
                max_tasks_per_child=self._RUNS,
            )
        try:
            return self._pool.submit(run_on_samples, name, folder).result()
        except process.BrokenProcessPool:
            self._pool = None
            return "the process died; see log.txt in its folder"


def _prepare_worker(folder: pathlib.Path) -> None:
    """Before jax is imported: experiments that differ in their data only share compiled code.

    The worker ends with the process that started it, however that ends.
    """
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.absolute() / "compiled"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_on_samples(name: str, folder: pathlib.Path) -> str | None:
    """Runs an experiment's commands on the samples in this process; returns what went wrong.

    All that it prints goes to log.txt beside the runs. The last command must leave results.
    """
    import shutil

    from moe_peft.cli import main

    experiment = files.load(name)
    log = experiment.folder(folder) / "log.txt"
    shutil.rmtree(log.parent, ignore_errors=True)
    log.parent.mkdir(parents=True)
    with open(log, "w") as file, _output_to(file):
        for line in experiment.two_minutes(folder):
            print("moe-peft", *line.arguments, flush=True)
            try:
                code = main.main(line.arguments)
            except Exception as error:  # goes into the record; its traceback into the log
                import traceback

                traceback.print_exc()
                return f"{line.command}: {type(error).__name__}: {gin_files.one_line(error)}"
            if code:
                return f"{line.command}: {log.read_text().rstrip().splitlines()[-1]}"
    made = next(b for b in line.bindings if b.startswith("MODEL_DIR=")).partition("=")[2]
    if not list(pathlib.Path(made).rglob("results.json")):
        return f"{line.command} left no results in {made}"
    return None


@contextlib.contextmanager
def _output_to(file: TextIO) -> Iterator[None]:
    """Sends standard output and error there, also what compiled code writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
