"""From one score per example to a table: mean and median over templates, per task, group, overall.

Pure functions over rows, so every number can be recomputed from `predictions.jsonl`.

An average goes up step by step, each step counting its parts equally: examples to a template of a
task; templates to the task (once by their mean, once by their median); tasks to their group, and
all tasks to the overall number. Sizes of tasks therefore do not matter, as in T0's and MoV's
tables. All scores are shares in [0, 1].
"""

from collections.abc import Iterable, Mapping
import dataclasses
import statistics
from typing import Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """One line of a table.

    Attributes:
      mean: average over tasks of the mean over templates.
      median: average over tasks of the median over templates.
      num_tasks: tasks averaged.
      num_examples: predictions behind them, all templates together.
    """

    mean: float
    median: float
    num_tasks: int
    num_examples: int


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """Scores of one task.

    Attributes:
      group: what the task is reported under (a CLDR function, a data set, a category).
      templates: mean score by template, in the order of their names.
      mean: over templates.
      median: over templates.
      num_examples: predictions, all templates together.
    """

    group: str
    templates: Mapping[str, float]
    mean: float
    median: float
    num_examples: int


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a table shows.

    Attributes:
      tasks: by name, sorted.
      groups: by name, sorted.
      overall: over all tasks.
    """

    tasks: Mapping[str, TaskSummary]
    groups: Mapping[str, Summary]
    overall: Summary

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries of plain values."""
        return dataclasses.asdict(self)


def aggregate(rows: Iterable[Mapping[str, Any]]) -> Results:
    """Results of rows that have "task", "group", "template" and "score".

    Raises ValueError without rows, or when a task appears under two groups.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    groups: dict[str, str] = {}
    for row in rows:
        task, group = row["task"], row["group"]
        if groups.setdefault(task, group) != group:
            raise ValueError(f"Task {task!r} appears under {groups[task]!r} and {group!r}.")
        by_template = scores.setdefault(task, {})
        by_template.setdefault(str(row["template"]), []).append(float(row["score"]))
    if not scores:
        raise ValueError("There is nothing to aggregate: no predictions.")
    tasks = {task: _task_summary(groups[task], scores[task]) for task in sorted(scores)}
    by_group: dict[str, list[TaskSummary]] = {}
    for task in tasks.values():
        by_group.setdefault(task.group, []).append(task)
    return Results(
        tasks=tasks,
        groups={group: _average(by_group[group]) for group in sorted(by_group)},
        overall=_average(list(tasks.values())),
    )


def _task_summary(group: str, by_template: Mapping[str, list[float]]) -> TaskSummary:
    templates = {name: statistics.fmean(by_template[name]) for name in sorted(by_template)}
    return TaskSummary(
        group=group,
        templates=templates,
        mean=statistics.fmean(templates.values()),
        median=statistics.median(templates.values()),
        num_examples=sum(map(len, by_template.values())),
    )


def _average(tasks: list[TaskSummary]) -> Summary:
    return Summary(
        mean=statistics.fmean(task.mean for task in tasks),
        median=statistics.fmean(task.median for task in tasks),
        num_tasks=len(tasks),
        num_examples=sum(task.num_examples for task in tasks),
    )
