"""Adaptations to new tasks side by side: a table, and parameters against score.

`moe-peft compare` reads the `results.json` that `moe-peft adapt` left in each folder. A row is a
variant: how many parameters it trains for a new task, and its score with each seed. The Pareto
front is made of the variants that no other one beats with as few parameters.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import rich.console

from moe_peft.evaluation import table as table_lib
from moe_peft.reports import compare, pareto
from moe_peft.runtime import tables

RESULTS = "results.json"

# Settings that change what a number means.
_MUST_AGREE = {
    "data": ("shots", "validation_shots", "test_split", "seeds"),
    "training": ("selection",),
    "evaluation": ("metric", "rank_choices", "length_normalized_choices"),
}
_COLUMNS = ("variant", "trained", "mean", "std", "median", "IQR", "seeds", "seconds")


def is_adaptation(folder: pathlib.Path | str) -> bool:
    """Whether a folder holds the results of an adaptation."""
    return (pathlib.Path(folder) / RESULTS).is_file()


def load(folders: Sequence[pathlib.Path | str]) -> dict[str, tuple[str, list[pareto.Row]]]:
    """Returns {mixture: (title, rows)} of the adaptations in some folders, in their order.

    Rows are called as `compare.labels` says. Raises UserError if results cannot be read, or if
    those of a mixture were not made alike.
    """
    found: dict[str, list[tuple[pathlib.Path, Mapping[str, Any]]]] = {}
    for folder in map(pathlib.Path, folders):
        content = compare.read(folder / RESULTS)
        found.setdefault(content["settings"]["data"]["mixture"], []).append((folder, content))
    compared = {}
    for mixture, members in found.items():
        sources, contents = zip(*members, strict=True)
        compare.check_alike(sources, list(map(_facts, contents)))
        methods = [content["settings"]["method"]["name"] for content in contents]
        rows = list(map(_row, compare.labels(sources, methods), contents))
        compared[mixture] = (_title(contents[0]), rows)
    return compared


def cells(row: pareto.Row) -> list[str]:
    """Returns what the table shows of a row: scores in per cent."""
    scores = (row.mean, row.std, row.median, row.iqr)
    shown = ["-" if share is None else f"{100 * share:.1f}" for share in scores]
    seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
    return [row.name, f"{row.trainable:,}", *shown, str(len(row.scores)), seconds]


def show(
    rows: Sequence[pareto.Row], title: str, console: rich.console.Console | None = None
) -> None:
    """Prints the table, best mean first; the front is bold."""
    table = tables.grid(*_COLUMNS, left=_COLUMNS[:1], padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    best = pareto.front(rows)
    for row in _sorted(rows):
        table.add_row(*cells(row), style="bold" if row in best else "")
    console = console or rich.console.Console()
    console.print(f"{title}; over seeds, the Pareto front in bold", style="bold", highlight=False)
    console.print(table)


def markdown(rows: Sequence[pareto.Row], title: str) -> str:
    """The same table for a document."""
    note = "Mean, sample standard deviation, median and interquartile range are over seeds, in per "
    note += "cent. The Pareto front is in bold."
    best = pareto.front(rows)
    name = lambda row: f"**{row.name}**" if row in best else row.name
    body = [[name(row), *cells(row)[1:]] for row in _sorted(rows)]
    return tables.markdown_table(title, note, _COLUMNS, body)


def to_json(rows: Sequence[pareto.Row], title: str) -> dict[str, Any]:
    """What the table shows, in numbers: shares in [0, 1]."""
    computed = lambda row: {n: getattr(row, n) for n in ("mean", "std", "median", "iqr")}
    best = pareto.front(rows)
    found = [dataclasses.asdict(row) | computed(row) | {"front": row in best} for row in rows]
    return {"title": title, "rows": found}


def write(rows: Sequence[pareto.Row], title: str, stem: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes <stem>.md, .json and .png; returns their paths."""
    from moe_peft.reports import pareto_picture  # Imports matplotlib.

    draw = lambda path: pareto_picture.draw(rows, title, path)
    content = markdown(rows, title), to_json(rows, title)
    return compare.write_files(pathlib.Path(stem), *content, draw)


def _sorted(rows: Sequence[pareto.Row]) -> list[pareto.Row]:
    return sorted(rows, key=lambda row: -row.mean)


def _row(name: str, content: Mapping[str, Any]) -> pareto.Row:
    scores = tuple(content["overall"]["by_seed"].values())
    return pareto.Row(name, content["trainable_parameters"], scores, content["seconds"])


def _facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What adaptations have in common if they answer the same question."""
    settings, tasks = content["settings"], sorted(content["tasks"])
    facts = {n: settings[part][n] for part, names in _MUST_AGREE.items() for n in names}
    return {**facts, "number of tasks": len(tasks), "tasks": tasks}


def _title(content: Mapping[str, Any]) -> str:
    settings, tasks = content["settings"], content["overall"]["num_tasks"]
    data, metric = settings["data"], table_lib.metric_title(settings["evaluation"])
    return f"{data['mixture']}: {metric} after adaptation, {data['shots']} shots, {tasks} tasks"
