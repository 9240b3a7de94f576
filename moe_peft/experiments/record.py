"""What checks of experiments found, in a file that several processes may add to, and scores.

A record counts as long as the experiment's fingerprint has not changed. Scores are those of
experiments that ran at full size.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import pathlib
import re
import statistics
from typing import Any

import moe_peft
from moe_peft import errors
from moe_peft.config import gin_files
from moe_peft.experiments import files
from moe_peft.runtime import json_files

LEVELS = ("parse", "plan", "run")
REACHED = {"parse": "parses", "plan": "plans", "run": "ran on samples"}
OK = "ok"


def default_record() -> pathlib.Path:
    """The record that comes with a checkout; elsewhere one below the working directory."""
    shipped = gin_files.packaged_folder().parent / "docs" / "results"
    return (shipped if shipped.is_dir() else pathlib.Path("results")) / "experiments.json"


@dataclasses.dataclass(frozen=True)
class Score:
    """What came of an experiment, in per cent, averaged as its table does."""

    value: float  # the number to compare
    published: float  # the number in the table
    spread: float | None  # the published one, over seeds; None where there is none

    def __str__(self) -> str:
        is_close = self.spread is not None and abs(self.value - self.published) <= self.spread
        return f"{'reproduced' if is_close else 'measured'}: {self.value:.2f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment and what its record says."""

    experiment: files.Experiment  # what the file's head says
    record: Mapping[str, Any]  # outcomes by level, "ok" or an error's line; empty: nothing counts
    score: Score | None = None  # what came of it at full size, if it ran

    @property
    def state(self) -> str:
        """The score at full size; else the highest level reached, or the first that failed."""
        if self.score:
            return str(self.score)
        done = list(itertools.takewhile(self.record.__contains__, LEVELS))
        failed = next((level for level in done if self.record[level] != OK), None)
        if failed:
            return f"{failed} fails: {self.record[failed]}"
        return REACHED[done[-1]] if done else "not checked"

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
    found: Iterable[files.Experiment], record: pathlib.Path, results: pathlib.Path | None = None
) -> list[Row]:
    """Experiments with what the record has for their present settings, and scores in `results`."""
    records = read(record)
    score = lambda each: measured(each, results) if results else None
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


def keep(record: pathlib.Path, experiment: files.Experiment, outcome: Mapping) -> None:
    """Adds an outcome to what is recorded of the experiment's present settings."""
    record.parent.mkdir(parents=True, exist_ok=True)
    # The folder's lock, not the file's: the file is replaced. Closing releases it.
    lock = os.open(record.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read(record)
        old = _current(records.get(experiment.name), experiment)
        if "run" in outcome:  # what an earlier run left goes
            old = {level: old[level] for level in LEVELS if level in old}
        date = datetime.date.today().isoformat()
        made = {"settings": experiment.fingerprint, "version": moe_peft.__version__, "date": date}
        records[experiment.name] = {**old, **outcome, **made}
        json_files.write_text(record, json.dumps(dict(sorted(records.items())), indent=1))
    finally:
        os.close(lock)


def measured(experiment: files.Experiment, root: pathlib.Path) -> Score | None:
    """The score in the folder that the experiment's last command names, below `root` for results/.

    None if nothing is there, or if it ran on the samples or with an embedded backbone.
    """
    last = experiment.commands[-1]
    folder = root / pathlib.Path(last.model_dir).relative_to("results")
    config = folder / "config.gin"
    is_adapted = last.command == "adapt"
    found = sorted(folder.glob("results.json" if is_adapted else "eval/*/results.json"))
    if not found or (config.is_file() and "'embedded:" in config.read_text(encoding="utf-8")):
        return None
    content = json.loads(found[0].read_text(encoding="utf-8"))
    value = _mean(experiment, content)
    spread = re.search(r"± ([\d.]+)", experiment.value)
    if experiment.paper == "poly_s":  # In other papers' parentheses stand other averages.
        spread = spread or re.search(r"\(([\d.]+)\)", experiment.value)
    published = float(experiment.value.split()[0])
    return Score(100 * value, published, float(spread[1]) if spread else None)


def _mean(experiment: files.Experiment, content: Mapping[str, Any]) -> float:
    """The number that the paper reports, from the results.json of `adapt` or `eval`."""
    if (overall := content.get("overall")) is not None:  # adapted
        # On T0 the mean over sets of medians over seeds, elsewhere means of both.
        is_t0 = experiment.sample == "samples/p3.gin"
        return overall["mean_of_task_medians"] if is_t0 else overall["over_seeds"]["mean"]
    # MHR's mean over sets; MoV's mean over data sets of medians over templates.
    results = content["results"]
    if experiment.paper == "mhr":
        return results["overall"]["mean"]
    left_out = {"anli"} if experiment.name.startswith("mov/sentence/") else set()
    groups = results["groups"]
    return statistics.fmean(groups[name]["median"] for name in groups.keys() - left_out)
