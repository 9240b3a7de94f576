"""`experiments`: the rows of the papers' tables, and how far each has been checked.

A check parses an experiment's commands, plans it at full size, or runs its two-minute version on
the samples. What came of it is kept in a file of records, so checks resume, and may be divided over
nights or machines. A record counts as long as the experiment's fingerprint has not changed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
import time
from typing import Any

import rich.box
import rich.console
import rich.table

import moe_peft
from moe_peft import errors, experiments, gin_utils

LEVELS = ("parse", "plan", "run")
_REACHED = {"parse": "parses", "plan": "plans", "run": "ran on samples"}
_OK = "ok"


def default_record() -> pathlib.Path:
    """The record that comes with a checkout; elsewhere one below the working directory."""
    shipped = gin_utils.packaged_folder().parent / "docs" / "results"
    return (shipped if shipped.is_dir() else pathlib.Path("results")) / "experiments.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment and what its record says.

    Attributes:
      experiment: what the file's head says.
      record: outcomes by level, "ok" or the error's line; empty if nothing counts.
    """

    experiment: experiments.Experiment
    record: Mapping[str, Any]

    @property
    def state(self) -> str:
        """The highest level reached, or the first one that failed."""
        state = "not checked"
        for level in LEVELS:
            if level not in self.record:
                break
            if self.record[level] != _OK:
                return f"{level} fails: {self.record[level]}"
            state = _REACHED[level]
        return state

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found, (many, new) = self.experiment, self.experiment.trainable
        return {
            "name": found.name,
            "row": found.title,
            "source": f"{experiments.PAPERS[found.paper]}: {found.source}",
            "size": found.size,
            "expected": found.expected,
            "trainable": many,
            "trainable_afterwards": new,
            "training_operations": found.operations,
            "state": self.state,
            "seconds_on_samples": self.record.get("seconds"),
        }


def select(
    names: Sequence[str] = (),
    papers: Sequence[str] = (),
    tables: Sequence[str] = (),
    sizes: Sequence[str] = (),
) -> list[experiments.Experiment]:
    """Experiments that fit every filter given.

    Args:
      names: of experiments or of folders of them, such as "mhr/t0_xl".
      papers: keys of `experiments.PAPERS`.
      tables: numbers as printed ("6"), or folders ("t0_xl").
      sizes: of the backbone, "770M", "3B" or "11B", in any case of letters.

    Raises:
      UserError: a filter fits nothing at all.
    """
    found = [experiments.load(name) for name in experiments.names()]
    tests: tuple[tuple[str, Sequence[str], Callable], ...] = (
        ("", names, lambda each: _prefixes(each.name)),
        ("--paper ", papers, lambda each: {each.paper}),
        ("--table ", tables, lambda each: {*each.tables, each.name.split("/")[1]}),
        ("--size ", [size.upper() for size in sizes], lambda each: {each.size}),
    )
    for flag, wanted, values in tests:
        known = set().union(*map(values, found))
        for value in wanted:
            if value not in known:
                near = errors.near(value, sorted(known)) or f" Known: {', '.join(sorted(known))}."
                raise errors.UserError(f"No experiment fits {flag}{value}.{near}")
        if wanted:
            found = [each for each in found if values(each) & set(wanted)]
    return found


def _prefixes(name: str) -> set[str]:
    """
    >>> sorted(_prefixes("a/b/c"))
    ['a', 'a/b', 'a/b/c']
    """
    parts = name.split("/")
    return {"/".join(parts[: i + 1]) for i in range(len(parts))}


def shard(found: Sequence[experiments.Experiment], which: str) -> list[experiments.Experiment]:
    """Part I of N, for which="I/N"; rows that share a multi-task run stay together.

    Raises:
      UserError: not of that form, or I is not in 1 ... N.
    """
    numbers = re.fullmatch(r"(\d+)/(\d+)", which)
    part, parts = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= part <= parts:
        raise errors.UserError(f"--shard is {which!r}; expected I/N with I of 1 ... N, as 1/4.")
    runs = list(dict.fromkeys(each.after or each.name for each in found))
    mine = set(runs[part - 1 :: parts])
    return [each for each in found if (each.after or each.name) in mine]


def rows(found: Iterable[experiments.Experiment], record: pathlib.Path) -> list[Row]:
    """Experiments with what the record has for their present settings."""
    records = _read(record)
    return [Row(each, _current(records.get(each.name), each)) for each in found]


def _current(entry: Mapping[str, Any] | None, experiment: experiments.Experiment) -> Mapping:
    return entry if entry and entry["settings"] == experiment.fingerprint else {}


def _read(record: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise errors.UserError(f"{record} is not a record of checks: {error}") from None


@contextlib.contextmanager
def _locked(record: pathlib.Path):
    """Keeps other processes away from the record."""
    record.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(record.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _keep(record: pathlib.Path, experiment: experiments.Experiment, outcome: Mapping) -> None:
    """Adds an outcome to what is recorded of the experiment's present settings."""
    with _locked(record):
        records = _read(record)
        old = _current(records.get(experiment.name), experiment)
        records[experiment.name] = {
            **old,
            **outcome,
            "settings": experiment.fingerprint,
            "version": moe_peft.__version__,
            "date": datetime.date.today().isoformat(),
        }
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
        os.replace(temporary, record)


def check(
    found: Sequence[experiments.Experiment],
    level: str,
    record: pathlib.Path,
    folder: pathlib.Path,
    is_again: bool = False,
) -> list[Row]:
    """Checks experiments one after another up to a level; returns all their rows.

    Args:
      found: the experiments.
      level: "parse", "plan" or "run"; lower ones come first.
      record: outcomes go there at once; those that count and are "ok" are not repeated.
      folder: runs of two-minute versions go there, and their logs.
      is_again: repeats everything.
    """
    wanted = LEVELS[: LEVELS.index(level) + 1]
    left = [
        row.experiment
        for row in rows(found, record)
        if is_again or any(row.record.get(each) != _OK for each in wanted)
    ]
    if len(left) < len(found):
        _say(f"{len(found) - len(left)} of {len(found)} were checked before")
    start = time.monotonic()
    with Workers() as workers:
        for number, experiment in enumerate(left, start=1):
            old = {} if is_again else rows([experiment], record)[0].record
            outcome = {}
            for each in wanted:
                if old.get(each) != _OK:
                    outcome |= _checked(each, experiment, record, folder, workers)
                    if outcome[each] != _OK:
                        break
            _keep(record, experiment, outcome)
            state = rows([experiment], record)[0].state
            spent = time.monotonic() - start
            to_go = spent / number * (len(left) - number) / 60
            _say(f"[{number}/{len(left)}] {experiment.name}: {state}; {to_go:.0f} min left")
    return rows(found, record)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _checked(
    level: str,
    experiment: experiments.Experiment,
    record: pathlib.Path,
    folder: pathlib.Path,
    workers: "Workers",
) -> dict[str, Any]:
    try:
        if level == "run":
            return _run(experiment, record, folder, workers)
        {"parse": parse, "plan": plan}[level](experiment)
    except errors.UserError as error:
        return {level: gin_utils.one_line(error)}
    return {level: _OK}


def _run(
    experiment: experiments.Experiment,
    record: pathlib.Path,
    folder: pathlib.Path,
    workers: "Workers",
) -> dict[str, Any]:
    """Runs the two-minute version, unless one with the very same settings has run.

    Rows of different sizes often differ in nothing on the samples.
    """
    digest = settings_on_samples(experiment)
    for name, entry in _read(record).items():
        same = entry.get("settings_on_samples") == digest and entry.get("run") == _OK
        if same and name != experiment.name and "ran_as" not in entry:
            return {"run": _OK, "settings_on_samples": digest, "ran_as": name}
    start = time.monotonic()
    problem = workers.run(experiment.name, folder)
    seconds = round(time.monotonic() - start)
    return {"run": problem or _OK, "settings_on_samples": digest, "seconds": seconds}


def settings_on_samples(experiment: experiments.Experiment) -> str:
    """A digest of all settings of the two-minute version but the folders of its runs."""
    from moe_peft import cli

    root = pathlib.Path("results")
    digest = hashlib.sha256()
    for line in experiment.two_minutes(root):
        cli.configure(line.command, line.gin_files, line.bindings)
        text = re.sub(r"NOMINAL_SIZE = \d+\n", "", gin_utils.resolved_text())
        for number, name in enumerate(filter(None, (experiment.name, experiment.after))):
            text = text.replace(str(experiments.load(name).folder(root)), f"run {number}")
        digest.update(f"{line.command}\n{text}".encode())
    return digest.hexdigest()[:12]


def parse(experiment: experiments.Experiment) -> None:
    """Reads the settings of every command, at full size and on the samples."""
    from moe_peft import cli

    lines = (*experiment.commands, *experiment.two_minutes(pathlib.Path("results")))
    for line in lines:
        cli.configure(line.command, line.gin_files, line.bindings)


def plan(experiment: experiments.Experiment):
    """Counts parameters at full size, from shapes, and operations; returns the plan.

    Raises:
      UserError: a count is not the one that the file's head gives.
    """
    from moe_peft import cli
    from moe_peft.analysis import cost

    found = cli.configure("plan", [experiment.gin_file], ["T5Config.scan_layers=True"])()
    many, is_full = experiment.trainable[0], "moves all" in experiment.hardware
    if many and not is_full:
        _compare(experiment, "parameters train", f"{many:,}", f"{found.trainable:,}")
    if experiment.operations:
        counted = cost.of_settings(is_full=is_full)
        _compare(experiment, "operations", f"{experiment.operations:.1e}", f"{counted:.1e}")
    return found


def _compare(experiment: experiments.Experiment, what: str, said: str, counted: str) -> None:
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

    from moe_peft import cli

    experiment = experiments.load(name)
    log = experiment.folder(folder) / "log.txt"
    shutil.rmtree(log.parent, ignore_errors=True)
    log.parent.mkdir(parents=True)
    with open(log, "w") as file, _output_to(file):
        for line in experiment.two_minutes(folder):
            print("moe-peft", *line.arguments, flush=True)
            try:
                code = cli.main(line.arguments)
            except Exception as error:  # goes into the record; its traceback into the log
                import traceback

                traceback.print_exc()
                return f"{line.command}: {type(error).__name__}: {gin_utils.one_line(error)}"
            if code:
                return f"{line.command}: {log.read_text().rstrip().splitlines()[-1]}"
    made = next(b for b in line.bindings if b.startswith("MODEL_DIR=")).partition("=")[2]
    if not list(pathlib.Path(made).rglob("results.json")):
        return f"{line.command} left no results in {made}"
    return None


@contextlib.contextmanager
def _output_to(file):
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


def show(found: Sequence[Row], as_json: bool = False) -> None:
    """Prints rows as a table, or as JSON."""
    if as_json:
        print(json.dumps([row.to_json() for row in found], indent=2, ensure_ascii=False))
        return
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    columns = ("experiment", "printed in", "size", "published", "trained", "afterwards")
    for column in (*columns, "operations", "state"):
        right = column in ("trained", "afterwards", "operations")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in found:
        table.add_row(*cells(row))
    console.print(table)
    counts = dict.fromkeys(("not checked", *_REACHED.values(), "fails"), 0)
    for row in found:
        counts["fails" if " fails: " in row.state else row.state] += 1
    said = [f"{count} {state}" for state, count in counts.items() if count]
    console.print(f"{len(found)} experiments: {', '.join(said)}; none reproduced at full size.")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    found = row.experiment
    many, new = (f"{count:,}" if count else "" for count in found.trainable)
    cost = f"{found.operations:.1e}" if found.operations else ""
    return found.name, found.source, found.size, found.value, many, new, cost, row.state


def markdown(found: Sequence[experiments.Experiment]) -> str:
    """The tables of docs/experiments.md, one per paper; what was checked changes too often."""
    titles = "row | experiment | printed in | size | published | trained | afterwards | operations"
    lines = []
    for paper, title in experiments.PAPERS.items():
        lines += [f"### {title}", "", f"| {titles} |", f"|{'---|' * 5}{'---:|' * 3}"]
        for each in found:
            if each.paper == paper:
                name, *rest, _ = cells(Row(each, {}))
                lines.append(f"| {' | '.join((each.title, f'`{name}`', *rest))} |")
        lines.append("")
    return "\n".join(lines).rstrip()
