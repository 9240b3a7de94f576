"""Checks of experiments: their settings, their counts, their two-minute versions.

Every command of a two-minute version is a process of its own, so that none can end the check, and
outcomes are recorded at once: a check resumes, and may be divided over nights.
"""

from collections.abc import Callable, Sequence
import functools
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from moe_peft import errors
from moe_peft.config import gin_files
from moe_peft.experiments import files
from moe_peft.experiments import record as record_lib

# Reads the settings of a command from its name, gin files and bindings; returns its entry point.
Configure = Callable[[str, Sequence[str], Sequence[str]], Callable]


def check(
    found: Sequence[files.Experiment],
    level: str,
    record: pathlib.Path,
    folder: pathlib.Path,
    is_again: bool = False,
    *,
    configure: Configure,
) -> list[record_lib.Row]:
    """Checks experiments one after another up to a level; returns all their rows.

    Of `record.LEVELS`, lower ones come first. Outcomes go to the record at once; those that count
    and are "ok" are repeated only if `is_again`. Two-minute versions leave runs and logs in
    `folder`. `configure` is the command line's.
    """
    wanted = record_lib.LEVELS[: record_lib.LEVELS.index(level) + 1]
    run = functools.partial(_run, record=record, folder=folder)
    checks = {"parse": parse, "plan": plan, "run": run}
    old = {row.experiment: {} if is_again else row.record for row in record_lib.rows(found, record)}
    left = [each for each in found if any(old[each].get(step) != record_lib.OK for step in wanted)]
    if len(left) < len(found):
        _say(f"{len(found) - len(left)} of {len(found)} were checked before")
    start = time.monotonic()
    for number, experiment in enumerate(left, start=1):
        outcome: dict[str, Any] = {}
        for step in wanted:
            if old[experiment].get(step) != record_lib.OK:
                outcome[step] = record_lib.OK
                try:
                    made = checks[step](experiment, configure)
                    outcome |= made if step == "run" else {}
                except errors.UserError as error:
                    outcome[step] = gin_files.one_line(error)
                if outcome[step] != record_lib.OK:
                    break
        record_lib.keep(record, experiment, outcome)
        state = record_lib.rows([experiment], record)[0].state
        to_go = (time.monotonic() - start) / number * (len(left) - number) / 60
        _say(f"[{number}/{len(left)}] {experiment.name}: {state}; {to_go:.0f} min left")
    return record_lib.rows(found, record)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(
    experiment: files.Experiment, configure: Configure, record: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
    """Runs the two-minute version, unless one with the very same settings has run.

    Rows of different sizes often differ in nothing on the samples. Returns what to record.
    """
    digest = settings_on_samples(experiment, configure)
    made = {"run": record_lib.OK, "settings_on_samples": digest}
    for name, entry in record_lib.read(record).items():
        is_first = "ran_as" not in entry and name != experiment.name
        if is_first and made.items() <= entry.items():
            return {**made, "ran_as": name}
    start = time.monotonic()
    made["run"] = run_on_samples(experiment, folder) or record_lib.OK
    return {**made, "seconds": round(time.monotonic() - start)}


def settings_on_samples(experiment: files.Experiment, configure: Configure) -> str:
    """A digest of all settings of the two-minute version but the folders of its runs."""
    root = pathlib.Path("results")
    digest = hashlib.sha256()
    for line in experiment.two_minutes(root):
        configure(line.command, line.gin_files, line.bindings)
        text = re.sub(r"NOMINAL_SIZE = \d+\n", "", gin_files.resolved_text())
        for number, name in enumerate(filter(None, (experiment.name, experiment.after))):
            text = text.replace(str(files.load(name).folder(root)), f"run {number}")
        digest.update(f"{line.command}\n{text}".encode())
    return digest.hexdigest()[:12]


def parse(experiment: files.Experiment, configure: Configure) -> None:
    """Reads the settings of every command, at full size and on the samples."""
    for line in (*experiment.commands, *experiment.two_minutes(pathlib.Path("results"))):
        configure(line.command, line.gin_files, line.bindings)


def plan(experiment: files.Experiment, configure: Configure):
    """Returns the plan at full size; a UserError if the head counts something else."""
    from moe_peft.preflight import operations

    found = configure("plan", [experiment.gin_file], ["T5Config.scan_layers=True"])()
    many = experiment.trainable[0]
    if many and not experiment.is_full:
        _compare(experiment, "parameters train", f"{many:,}", f"{found.trainable:,}")
    if experiment.operations:
        counted = operations.of_settings(is_full=experiment.is_full)
        _compare(experiment, "operations", f"{experiment.operations:.1e}", f"{counted:.1e}")
    return found


def _compare(experiment: files.Experiment, what: str, said: str, counted: str) -> None:
    if said != counted:
        numbers = f"its head says {said} {what}, counted are {counted}"
        raise errors.UserError(f"{experiment.gin_file}: {numbers}.")


def run_on_samples(experiment: files.Experiment, folder: pathlib.Path) -> str | None:
    """Runs an experiment's commands on the samples; returns what went wrong, in a line, or None.

    All that they print goes to log.txt next to the runs. The last command must leave results.
    """
    log = experiment.folder(folder) / "log.txt"
    shutil.rmtree(log.parent, ignore_errors=True)
    log.parent.mkdir(parents=True)
    # Experiments that differ in their data only share compiled code.
    environ = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled"), **os.environ}
    for line in experiment.two_minutes(folder):
        with open(log, "a") as file:
            print("moe-peft", *line.arguments, file=file, flush=True)
            command = [sys.executable, "-m", "moe_peft", *line.arguments]
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, env=environ, **streams).returncode
        if code < 0:
            return f"{line.command}: {signal.Signals(-code).name} ended the process; see {log}"
        if code:
            return f"{line.command}: {log.read_text().rstrip().splitlines()[-1]}"
    if not list(pathlib.Path(line.model_dir).rglob("results.json")):
        return f"{line.command} left no results in {line.model_dir}"
    return None
