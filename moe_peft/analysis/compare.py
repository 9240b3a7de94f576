"""Several evaluated runs side by side: a table on the terminal, in Markdown and JSON, and a picture."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import rich.box
import rich.console
import rich.table

from moe_peft import errors

RESULTS = "results.json"
OVERALL = "overall"


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated run.

    Attributes:
      name: what tables call it.
      scores: {"overall" or group: {"mean": share, "median": share, "num_tasks": count}}.
      num_tasks: tasks behind the overall number.
    """

    name: str
    scores: Mapping[str, Mapping[str, float]]
    num_tasks: int


def read(folder: pathlib.Path | str) -> Run:
    """The run that was evaluated into `folder`, called by the folder's name.

    Raises:
      UserError: there are no results, or they cannot be read.
    """
    folder = pathlib.Path(folder)
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scores = {OVERALL: found["overall"], **found["groups"]}
        return Run(folder.resolve().name, scores, int(found["overall"]["num_tasks"]))
    except FileNotFoundError:
        raise errors.UserError(
            f"There is no {path}. Evaluate the run first, with `moe-peft eval`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path} holds no results of an evaluation: {error!r}.") from error


def compare(
    folders: Sequence[pathlib.Path | str], out: pathlib.Path | str, title: str = "Exact match"
) -> list[Run]:
    """Prints the runs beside each other; writes comparison.md, comparison.json, comparison.png.

    Args:
      folders: of evaluated runs, one column each, in this order.
      out: folder to write to; made if missing.
      title: of table and picture.

    Raises:
      UserError: a folder has no results, or the runs were evaluated on different tasks.
    """
    runs = [read(folder) for folder in folders]
    _check_same_tasks(runs)
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(markdown(runs, title), encoding="utf-8")
    written: dict[str, Any] = {run.name: run.scores for run in runs}
    (out / "comparison.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    draw(runs, title, out / "comparison.png")
    _console().print(table(runs, title))
    return runs


def _check_same_tasks(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.scores.keys() != first.scores.keys() or run.num_tasks != first.num_tasks:
            raise errors.UserError(
                f"{first.name} and {run.name} were evaluated on different tasks "
                f"({first.num_tasks} and {run.num_tasks}); their averages do not compare."
            )


def _console() -> rich.console.Console:
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 120
    return console


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """Group, then mean and median of every run in per cent; the overall numbers come last."""
    groups = [*(group for group in runs[0].scores if group != OVERALL), OVERALL]
    return [
        [
            group,
            *(
                f"{100 * run.scores[group][statistic]:.1f}"
                for run in runs
                for statistic in ("mean", "median")
            ),
        ]
        for group in groups
    ]


def table(runs: Sequence[Run], title: str) -> rich.table.Table:
    """Groups down, runs across."""
    result = rich.table.Table(
        title=f"{title}, %: mean / median over templates",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    result.add_column("")
    for run in runs:
        result.add_column(run.name, justify="right")
    for group, *values in _rows(runs):
        cells = [f"{mean:>5} / {median:>5}" for mean, median in zip(values[::2], values[1::2])]
        result.add_row(group, *cells, style="bold" if group == OVERALL else None)
    return result


def markdown(runs: Sequence[Run], title: str) -> str:
    """The same table as a Markdown document."""
    head = ["", *(f"{run.name} {what}" for run in runs for what in ("mean", "median"))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *_rows(runs)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = f"Average over {runs[0].num_tasks} tasks of the mean and median over their templates."
    return f"# {title}, per cent\n\n{text}\n\n{note}\n"


def draw(runs: Sequence[Run], title: str, path: pathlib.Path) -> None:
    """Bars: one cluster per group, one bar per run, the overall cluster apart on the right."""
    import matplotlib.figure

    groups = [*(group for group in runs[0].scores if group != OVERALL), OVERALL]
    places = [index + 0.5 * (group == OVERALL) for index, group in enumerate(groups)]
    figure = matplotlib.figure.Figure(figsize=(max(6.0, 1.1 * len(groups)), 4.0))
    axes = figure.subplots()
    width = 0.8 / len(runs)
    colours = ("#9e9e9e", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
    for number, run in enumerate(runs):
        heights = [100 * run.scores[group]["mean"] for group in groups]
        lefts = [place + (number - (len(runs) - 1) / 2) * width for place in places]
        axes.bar(lefts, heights, width, label=run.name, color=colours[number % len(colours)])
    axes.set_xticks(places, groups, rotation=30, ha="right")
    axes.set_ylabel(f"{title.lower()}, % (mean over templates)")
    axes.set_title(f"{title} on {runs[0].num_tasks} tasks")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(runs))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
