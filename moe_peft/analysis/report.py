"""Results of several runs side by side: a table, Markdown, JSON and a picture.

    moe-peft compare results/frozen results/ia3 results/mov --out results

reads the `eval/<mixture>/results.json` that `moe-peft eval` left in each run's folder. Numbers are
per cent; mean and median are over the templates of a task, then averaged over tasks.
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

OVERALL = "all tasks"

# Settings that change what a number means.
_MUST_AGREE = (
    "metric",
    "rank_choices",
    "length_normalized_choices",
    "split",
    "max_examples_per_task",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One column of a table.

    Attributes:
      name: what the column is called.
      content: of the run's results.json.
    """

    name: str
    content: Mapping[str, Any]

    @property
    def lines(self) -> dict[str, Mapping[str, Any]]:
        """Averages by group, all tasks last."""
        results = self.content["results"]
        return {**results["groups"], OVERALL: results["overall"]}

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.content["run"]["trainable_parameters"]

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of all parameters."""
        return self.trainable / self.content["run"]["total_parameters"]

    def size(self) -> str:
        """The trainable parameters for a person: "74,880 (1.2 %)"."""
        if not self.trainable:
            return "0"
        percent = 100 * self.trainable_share
        return f"{self.trainable:,} ({percent:.{2 if percent < 1 else 1}f} %)"


def load(folders: Sequence[pathlib.Path | str]) -> dict[str, list[Run]]:
    """The evaluations found in folders of runs, by mixture, in the order of the folders.

    A run is called by its method; where two runs of a mixture share it, by their folders.

    Raises UserError for a folder without results, or results that cannot be read.
    """
    found: dict[str, list[tuple[pathlib.Path, Mapping[str, Any]]]] = {}
    for folder in map(pathlib.Path, folders):
        paths = sorted(folder.glob("eval/*/results.json"))
        if not paths:
            raise errors.UserError(
                f"{folder} holds no results (eval/*/results.json); make them with `moe-peft eval`."
            )
        for path in paths:
            content = _read(path)
            found.setdefault(content["mixture"], []).append((folder, content))
    runs = {}
    for mixture, members in found.items():
        names = [content["run"]["method"]["name"] for _, content in members]
        runs[mixture] = [
            Run(name if names.count(name) == 1 else folder.name, content)
            for name, (folder, content) in zip(names, members, strict=True)
        ]
        check_comparable(runs[mixture])
    return runs


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises UserError unless all runs answered the same examples and were scored alike."""
    first = runs[0]
    for run in runs[1:]:
        for part in _MUST_AGREE:
            was, now = first.content["settings"][part], run.content["settings"][part]
            if was != now:
                raise errors.UserError(
                    f"{first.name} and {run.name} cannot be compared: {part} is {was} and {now}."
                )
        counts = [{k: v["num_examples"] for k, v in r.lines.items()} for r in (first, run)]
        if counts[0] != counts[1]:
            raise errors.UserError(
                f"{first.name} and {run.name} cannot be compared: they answered "
                f"{counts[0][OVERALL]} and {counts[1][OVERALL]} examples, or other tasks."
            )


def title(runs: Sequence[Run]) -> str:
    """What the numbers are."""
    settings = runs[0].content["settings"]
    metric = settings["metric"].replace("_", " ")
    if settings["rank_choices"]:
        metric = f"accuracy by rank where there are choices, else {metric}"
    count = runs[0].lines[OVERALL]["num_examples"]
    return f"{runs[0].content['mixture']}: {metric}, per cent ({count:,} examples)"


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Cells of the table: name of the group, number of tasks, "mean / median" of each run."""
    return [
        [
            group,
            str(runs[0].lines[group]["num_tasks"]),
            *(_cell(run.lines[group]) for run in runs),
        ]
        for group in runs[0].lines
    ]


def show(runs: Sequence[Run], console: rich.console.Console | None = None) -> None:
    """Prints the table."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        show_footer=True,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", footer="trainable", no_wrap=True)
    table.add_column("tasks", justify="right")
    for run in runs:
        table.add_column(
            run.name, no_wrap=True, footer=run.size().replace(" (", "\n("), justify="right"
        )
    body = [[cell.replace(" / ", "/") for cell in row] for row in rows(runs)]
    for row in body[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*body[-1], style="bold")
    console = console or _console()
    console.print(f"{title(runs)}; mean/median over templates", style="bold", highlight=False)
    console.print(table)


def markdown(runs: Sequence[Run]) -> str:
    """The same table for a document."""
    lines = [f"### {title(runs)}", "", "Each cell: mean / median over templates.", ""]
    names = ["", "tasks", *(run.name for run in runs)]
    lines += ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    *groups, overall = rows(runs)
    lines += ["| " + " | ".join(row) + " |" for row in groups]
    lines.append("| " + " | ".join(f"**{cell}**" for cell in overall) + " |")
    lines.append("| trainable | | " + " | ".join(run.size() for run in runs) + " |")
    return "\n".join(lines)


def to_json(runs: Sequence[Run]) -> dict[str, Any]:
    """What the table shows, in numbers: shares in [0, 1]."""
    return {
        "mixture": runs[0].content["mixture"],
        "settings": runs[0].content["settings"],
        "runs": [
            {
                "name": run.name,
                "run": run.content["run"],
                "lines": run.lines,
            }
            for run in runs
        ],
    }


def write(runs: Sequence[Run], folder: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes <mixture>.md, .json and .png into a folder; returns their paths."""
    from moe_peft.analysis import picture  # Imports matplotlib.
    from moe_peft.evaluation import predictions

    stem = pathlib.Path(folder) / runs[0].content["mixture"]
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    predictions.write_text(paths[0], markdown(runs))
    predictions.write_json(paths[1], to_json(runs))
    picture.draw(runs, paths[2])
    return paths


def _console() -> rich.console.Console:
    """Standard output; a file or a pipe gets lines wide enough for many runs."""
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 140
    return console


def _cell(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['mean']:.1f} / {100 * summary['median']:.1f}"


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error
