"""What checks of experiments found, in a file that several processes may add to.

A record counts as long as the experiment's fingerprint has not changed.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
from typing import Any

import moe_peft
from moe_peft import errors
from moe_peft.config import gin_files
from moe_peft.experiments import files
from moe_peft.experiments import results as results_lib

LEVELS = ("parse", "plan", "run")
REACHED = {"parse": "parses", "plan": "plans", "run": "ran on samples"}
OK = "ok"


def default_record() -> pathlib.Path:
    """The record that comes with a checkout; elsewhere one below the working directory."""
    shipped = gin_files.packaged_folder().parent / "docs" / "results"
    return (shipped if shipped.is_dir() else pathlib.Path("results")) / "experiments.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment and what its record says.

    Attributes:
      experiment: what the file's head says.
      record: outcomes by level, "ok" or the error's line; empty if nothing counts.
      score: what came of it at full size, if it ran.
    """

    experiment: files.Experiment
    record: Mapping[str, Any]
    score: results_lib.Score | None = None

    @property
    def state(self) -> str:
        """The score at full size; else the highest level reached, or the first that failed."""
        if self.score:
            return str(self.score)
        state = "not checked"
        for level in LEVELS:
            if level not in self.record:
                break
            if self.record[level] != OK:
                return f"{level} fails: {self.record[level]}"
            state = REACHED[level]
        return state

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found, (many, new) = self.experiment, self.experiment.trainable
        return {
            "name": found.name,
            "row": found.title,
            "source": f"{files.PAPERS[found.paper]}: {found.source}",
            "size": found.size,
            "expected": found.expected,
            "trainable": many,
            "trainable_afterwards": new,
            "training_operations": found.operations,
            "state": self.state,
            "score": self.score and self.score.value,
            "seconds_on_samples": self.record.get("seconds"),
        }


def rows(
    found: Iterable[files.Experiment],
    record: pathlib.Path,
    results: pathlib.Path | None = None,
) -> list[Row]:
    """Experiments with what the record has for their present settings, and scores in `results`."""
    records = read(record)
    score = lambda each: results_lib.measured(each, results) if results else None
    return [Row(each, _current(records.get(each.name), each), score(each)) for each in found]


def _current(entry: Mapping[str, Any] | None, experiment: files.Experiment) -> Mapping:
    return entry if entry and entry["settings"] == experiment.fingerprint else {}


def read(record: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Outcomes by experiment; a UserError if the file is broken."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise errors.UserError(f"{record} is not a record of checks: {error}") from None


@contextlib.contextmanager
def _locked(record: pathlib.Path) -> Iterator[None]:
    """Keeps other processes away from the record."""
    record.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(record.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def keep(record: pathlib.Path, experiment: files.Experiment, outcome: Mapping) -> None:
    """Adds an outcome to what is recorded of the experiment's present settings."""
    with _locked(record):
        records = read(record)
        old = _current(records.get(experiment.name), experiment)
        if "run" in outcome:  # what an earlier run left goes
            old = {level: old[level] for level in LEVELS if level in old}
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
