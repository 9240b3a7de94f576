"""Adaptations to new tasks side by side: a table, and parameters against score.

    moe-peft compare results/lora_few results/mhr_z_few --out results

reads the `results.json` that `moe-peft adapt` left in each folder. A row is a variant: how many
parameters it trains for a new task, and its score with each seed. The Pareto front is made of the
variants that no other one beats with as few parameters.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import rich.box
import rich.console
import rich.table

from moe_peft import errors
from moe_peft.evaluation import table as table_lib
from moe_peft.reports import pareto

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

    A row is called by its method; where two of a mixture share it, by their folders.

    Raises:
      UserError: results cannot be read, or those of a mixture were not made alike.
    """
    found: dict[str, list[tuple[pathlib.Path, Mapping[str, Any]]]] = {}
    for folder in map(pathlib.Path, folders):
        content = _read(folder / RESULTS)
        found.setdefault(content["settings"]["data"]["mixture"], []).append((folder, content))
    tables = {}
    for mixture, members in found.items():
        for folder, content in members[1:]:
            _check_alike(members[0], (folder, content))
        names = [content["settings"]["method"]["name"] for _, content in members]
        rows = [
            _row(name if names.count(name) == 1 else folder.name, content)
            for name, (folder, content) in zip(names, members, strict=True)
        ]
        tables[mixture] = (_title(members[0][1]), rows)
    return tables


def cells(row: pareto.Row) -> list[str]:
    """Returns what the table shows of a row: scores in per cent."""
    percent = lambda share: "-" if share is None else f"{100 * share:.1f}"
    return [
        row.name,
        f"{row.trainable:,}",
        percent(row.mean),
        percent(row.std),
        percent(row.median),
        percent(row.iqr),
        str(len(row.scores)),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def show(
    rows: Sequence[pareto.Row], title: str, console: rich.console.Console | None = None
) -> None:
    """Prints the table, best mean first; the front is bold."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    best = pareto.front(rows)
    for row in _sorted(rows):
        table.add_row(*cells(row), style="bold" if row in best else "")
    console = console or rich.console.Console()
    console.print(f"{title}; over seeds, the Pareto front in bold", style="bold", highlight=False)
    console.print(table)


def markdown(rows: Sequence[pareto.Row], title: str) -> str:
    """The same table for a document."""
    lines = [f"### {title}", "", "Mean, sample standard deviation, median and interquartile range"]
    lines[-1] += " are over seeds, in per cent. The Pareto front is in bold."
    lines += ["", "| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    best = pareto.front(rows)
    for row in _sorted(rows):
        name, *numbers = cells(row)
        name = f"**{name}**" if row in best else name
        lines.append("| " + " | ".join([name, *numbers]) + " |")
    return "\n".join(lines)


def to_json(rows: Sequence[pareto.Row], title: str) -> dict[str, Any]:
    """What the table shows, in numbers: shares in [0, 1]."""
    best = pareto.front(rows)
    return {"title": title, "rows": [_as_json(row) | {"front": row in best} for row in rows]}


def write(rows: Sequence[pareto.Row], title: str, stem: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes <stem>.md, .json and .png; returns their paths."""
    from moe_peft.reports import pareto_picture  # Imports matplotlib.
    from moe_peft.runtime import json_files

    stem = pathlib.Path(stem)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    json_files.write_text(paths[0], markdown(rows, title))
    json_files.write_json(paths[1], to_json(rows, title))
    pareto_picture.draw(rows, title, paths[2])
    return paths


def _sorted(rows: Sequence[pareto.Row]) -> list[pareto.Row]:
    return sorted(rows, key=lambda row: -row.mean)


def _as_json(row: pareto.Row) -> Mapping[str, Any]:
    computed = {name: getattr(row, name) for name in ("mean", "std", "median", "iqr")}
    return {**dataclasses.asdict(row), **computed}


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error


def _row(name: str, content: Mapping[str, Any]) -> pareto.Row:
    scores = tuple(content["overall"]["by_seed"].values())
    return pareto.Row(name, content["trainable_parameters"], scores, content["seconds"])


def _check_alike(first, other) -> None:
    """Raises UserError unless both (folder, content) answer the same question."""
    for part, names in _MUST_AGREE.items():
        for name in names:
            was, now = (content["settings"][part][name] for _, content in (first, other))
            if was != now:
                raise errors.UserError(
                    f"{first[0]} and {other[0]} cannot be compared: {name} is {was} and {now}."
                )
    was, now = (sorted(content["tasks"]) for _, content in (first, other))
    if was != now:
        raise errors.UserError(
            f"{first[0]} and {other[0]} cannot be compared: they hold {len(was)} and {len(now)} "
            "tasks, or other ones."
        )


def _title(content: Mapping[str, Any]) -> str:
    settings, tasks = content["settings"], content["overall"]["num_tasks"]
    data, metric = settings["data"], table_lib.metric_title(settings["evaluation"])
    return f"{data['mixture']}: {metric} after adaptation, {data['shots']} shots, {tasks} tasks"
