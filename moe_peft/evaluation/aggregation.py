"""From predictions to a table: mean and median over templates, per task, group, overall.

Pure functions over rows, so every number can be recomputed from the files of an evaluation.

An average goes up step by step: examples to a template of a task (by the row's metric); templates
to the task (once by their mean, once by their median); tasks to their group and to the overall
number by one of four rules:

    tasks           tasks count equally, whatever their size or group (T0, T-Few, MHR)
    groups          tasks of a group are averaged first, then groups count equally (MoV's tables,
                    where the three rounds of ANLI are one column)
    pooled_groups   as "groups", but mean and median of a group are over the templates of all its
                    tasks together (the other reading of MoV's ANLI)
    examples        tasks weigh by their examples (Tk-Instruct on SuperNI)

Scores are shares, 1 at best.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from jaxtyping import Float
import numpy as np

from moe_peft import errors
from moe_peft.evaluation import bootstrap as bootstrap_lib

Row = Mapping[str, Any]

AVERAGES = {
    "tasks": "mean over tasks",
    "groups": "mean over groups",
    "pooled_groups": "mean over groups, templates of a group pooled",
    "examples": "mean over tasks, weighted by their examples",
}

_OVERALL = ("overall", "")
_Line = tuple[str, str]  # ("task" | "group" | "overall", name)
_MeanAndMedian = Float[np.ndarray, "2 B"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """One line of a table: a group of tasks, or all of them."""

    mean: float  # average over tasks of the mean over templates
    median: float  # average over tasks of the median over templates
    num_tasks: int  # tasks averaged
    num_examples: int  # predictions behind them, all templates together
    metric: str | None = None  # its name; None if there are several, or rows do not say
    mean_interval: list[float] | None = None  # [low, high]; None if nothing was resampled
    median_interval: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """Scores of one task."""

    group: str  # what the task is reported under (a CLDR function, a data set, a category)
    templates: Mapping[str, float]  # score by template, in the order of their names
    mean: float  # over templates
    median: float  # over templates
    num_examples: int  # predictions, all templates together
    metric: str | None = None  # as in `Summary`, and so on
    mean_interval: list[float] | None = None
    median_interval: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a table shows; tasks and groups by name, sorted."""

    tasks: Mapping[str, TaskSummary]
    groups: Mapping[str, Summary]
    overall: Summary

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries of plain values."""
        return dataclasses.asdict(self)


def aggregate(
    rows: Iterable[Row], average: str = "tasks", bootstrap: bootstrap_lib.Bootstrap | None = None
) -> Results:
    """Results of rows that have "task", "group", "template" and "score".

    Where "metric" names a metric of all examples together, "prediction" and "references" or
    "targets" count instead of "score". `average` is the rule from tasks to groups and to the
    overall number. Raises ValueError without rows, or when a task appears under two groups.
    """
    errors.check_one_of("average", average, AVERAGES)
    tasks = _tasks(rows)
    scores = {task.name: np.array([each.score() for each in task.templates]) for task in tasks}
    lines = _roll_up(tasks, {name: column[:, None] for name, column in scores.items()}, average)
    intervals = {} if bootstrap is None else _intervals(tasks, scores, lines, average, bootstrap)

    def summary(line: _Line, own: Sequence[_Task]) -> dict[str, Any]:
        return {
            "mean": float(lines[line][0, 0]),
            "median": float(lines[line][1, 0]),
            "num_examples": sum(task.num_examples for task in own),
            "metric": _only({task.metric for task in own}),
            **intervals.get(line, {}),
        }

    return Results(
        tasks={
            task.name: TaskSummary(
                group=task.group,
                templates=dict(zip(task.names, scores[task.name].tolist(), strict=True)),
                **summary(("task", task.name), [task]),
            )
            for task in tasks
        },
        groups={
            group: Summary(num_tasks=len(own), **summary(("group", group), own))
            for group, own in _by_group(tasks).items()
        },
        overall=Summary(num_tasks=len(tasks), **summary(_OVERALL, tasks)),
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    name: str
    group: str
    metric: str | None
    names: Sequence[str]  # of the templates, sorted
    templates: Sequence[bootstrap_lib.Examples]

    @property
    def num_examples(self) -> int:
        return sum(map(len, self.templates))


def _tasks(rows: Iterable[Row]) -> list[_Task]:
    """Tasks, sorted by name."""
    found: dict[str, dict[str, list[Row]]] = {}
    groups: dict[str, str] = {}
    metrics: dict[str, set[str | None]] = {}
    for row in rows:
        task, group = row["task"], row["group"]
        if groups.setdefault(task, group) != group:
            raise ValueError(f"Task {task!r} appears under {groups[task]!r} and {group!r}.")
        metrics.setdefault(task, set()).add(row.get("metric"))
        found.setdefault(task, {}).setdefault(str(row["template"]), []).append(row)
    if not found:
        raise ValueError("There is nothing to aggregate: no predictions.")
    read = bootstrap_lib.Examples.from_rows
    return [
        _Task(
            task, groups[task], _only(metrics[task]), sorted(of), [read(of[k]) for k in sorted(of)]
        )
        for task, of in sorted(found.items())
    ]


def _only(names: Collection[str | None]) -> str | None:
    """The name that all have; None if there are several."""
    return next(iter(names)) if len(names) == 1 else None


def _by_group(tasks: Sequence[_Task]) -> dict[str, list[_Task]]:
    groups = sorted({task.group for task in tasks})
    return {group: [task for task in tasks if task.group == group] for group in groups}


def _roll_up(
    tasks: Sequence[_Task], scores: Mapping[str, Float[np.ndarray, "T B"]], average: str
) -> dict[_Line, _MeanAndMedian]:
    """Mean and median of every line, from the scores of every task's templates."""
    over = lambda columns: np.stack([np.mean(columns, axis=0), np.median(columns, axis=0)])
    lines = {("task", task.name): over(scores[task.name]) for task in tasks}
    for group, own in _by_group(tasks).items():
        if average == "pooled_groups":
            lines["group", group] = over(np.concatenate([scores[task.name] for task in own]))
        else:
            parts = np.stack([lines["task", task.name] for task in own])
            lines["group", group] = _weighted(parts, _weights(own, average))
    lines[_OVERALL] = _weighted(*_parts_of_overall(tasks, lines, average))
    return lines


def _parts_of_overall(
    tasks: Sequence[_Task], lines: Mapping[_Line, _MeanAndMedian], average: str
) -> tuple[Float[np.ndarray, "u 2 B"], Float[np.ndarray, " u"]]:
    """What the overall number is a mean of, and the weights."""
    if average in ("groups", "pooled_groups"):
        parts = [lines["group", group] for group in _by_group(tasks)]
        return np.stack(parts), np.ones(len(parts))
    return np.stack([lines["task", task.name] for task in tasks]), _weights(tasks, average)


def _weights(tasks: Sequence[_Task], average: str) -> Float[np.ndarray, " u"]:
    return np.array([task.num_examples if average == "examples" else 1.0 for task in tasks])


def _weighted(parts: Float[np.ndarray, "u 2 B"], weights: np.ndarray) -> _MeanAndMedian:
    """Weighted mean over parts; weights [u] or [u, B]."""
    weights = weights.reshape(len(weights), 1, -1)
    return np.sum(parts * weights, axis=0) / np.sum(weights, axis=0)


def _intervals(tasks, scores, lines, average, how) -> dict[_Line, dict[str, list[float]]]:
    """Fields of a summary that say how sure it is, by line."""
    if how.over == "tasks":
        parts, weights = _parts_of_overall(tasks, lines, average)
        chosen = how.generator("").integers(len(parts), size=(len(parts), how.resamples))
        drawn = np.moveaxis(parts[:, :, 0][chosen], -1, 1)
        resampled = {_OVERALL: _weighted(drawn, weights[chosen])}
    else:
        found = {
            task.name: bootstrap_lib.over_examples(task.name, task.templates, how)
            if how.over == "examples"
            else bootstrap_lib.over_templates(task.name, scores[task.name], how)
            for task in tasks
        }
        resampled = _roll_up(tasks, found, average)
    return {
        line: {"mean_interval": how.interval(mean), "median_interval": how.interval(median)}
        for line, (mean, median) in resampled.items()
    }
