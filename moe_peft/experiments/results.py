"""Scores of experiments that ran at full size, beside the published ones."""

import dataclasses
import json
import pathlib
import re
import statistics
from typing import Any

from moe_peft.experiments import files


@dataclasses.dataclass(frozen=True)
class Score:
    """What came of an experiment, in per cent, averaged as its table does.

    Attributes:
      value: the number to compare.
      published: likewise.
      spread: the published one, over seeds; None where there is none.
    """

    value: float
    published: float
    spread: float | None

    @property
    def is_reproduced(self) -> bool:
        """Whether the score lies within the published spread."""
        return self.spread is not None and abs(self.value - self.published) <= self.spread

    def __str__(self) -> str:
        return f"{'reproduced' if self.is_reproduced else 'measured'}: {self.value:.2f}"


def measured(experiment: files.Experiment, root: pathlib.Path) -> Score | None:
    """The score in the folder that the experiment's last command names, below `root` for results/.

    None if nothing is there, or if it ran on the samples or with an embedded backbone.
    """
    last = experiment.commands[-1]
    named = next(b.partition("=")[2] for b in last.bindings if b.startswith("MODEL_DIR="))
    folder = root / pathlib.Path(named).relative_to("results")
    config = folder / "config.gin"
    pattern = "results.json" if last.command == "adapt" else "eval/*/results.json"
    found = sorted(folder.glob(pattern))
    if not found or (config.is_file() and "'embedded:" in config.read_text(encoding="utf-8")):
        return None
    content = json.loads(found[0].read_text(encoding="utf-8"))
    average = _adapted if last.command == "adapt" else _evaluated
    published = re.match(r"([\d.]+)(?: ± ([\d.]+)| \(([\d.]+)\))?", experiment.expected)
    iqr = published[3] if experiment.paper == "poly_s" else None
    spread = published[2] or iqr
    return Score(
        100 * average(experiment, content), float(published[1]), float(spread) if spread else None
    )


def _adapted(experiment: files.Experiment, content: dict[str, Any]) -> float:
    """On T0 the mean over sets of medians over seeds, elsewhere means of both."""
    overall = content["overall"]
    if experiment.sample == "samples/p3.gin":
        return overall["mean_of_task_medians"]
    return overall["over_seeds"]["mean"]


def _evaluated(experiment: files.Experiment, content: dict[str, Any]) -> float:
    """MHR's mean over sets; MoV's mean over data sets of medians over templates."""
    results = content["results"]
    if experiment.paper == "mhr":
        return results["overall"]["mean"]
    left_out = {"anli"} if experiment.name.startswith("mov/sentence/") else set()
    groups = results["groups"]
    return statistics.fmean(groups[name]["median"] for name in groups.keys() - left_out)
