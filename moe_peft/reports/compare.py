"""Results of several runs side by side: a table, Markdown, JSON and a picture.

    moe-peft compare results/frozen results/ia3 results/mov --out results

reads the `eval/<mixture>/results.json` that `moe-peft eval` left in each run's folder. Numbers are
per cent; mean and median are over the templates of a task, then averaged over tasks.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import rich.box
import rich.console
import rich.table

from moe_peft import errors
from moe_peft.evaluation import aggregation

OVERALL = "all tasks"

# Settings that change what a number means, and what they were before they could be set.
_MUST_AGREE = {
    "metric": None,
    "rank_choices": False,
    "length_normalized_choices": False,
    "split": None,
    "max_examples_per_task": None,
    "average": "tasks",
}


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
        for part, default in _MUST_AGREE.items():
            was, now = (r.content["settings"].get(part, default) for r in (first, run))
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
    metric = metric_title(settings)
    count = runs[0].lines[OVERALL]["num_examples"]
    return f"{runs[0].content['mixture']}: {metric}, per cent ({count:,} examples)"


def metric_title(settings: Mapping[str, Any]) -> str:
    """What scores are, from the settings of an evaluation."""
    metric = settings["metric"].replace("_", " ")
    metric = "each task's own metric" if metric == "task" else metric
    if settings["rank_choices"]:
        return f"accuracy by rank where there are choices, else {metric}"
    return metric


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Cells of the table, see `columns`."""
    more = [show for name, show in _MORE.items() if name in columns(runs)]
    return [
        [
            group,
            str(runs[0].lines[group]["num_tasks"]),
            *(_cell(run.lines[group]) for run in runs),
            *(show(runs[0].lines[group]) for show in more),
        ]
        for group in runs[0].lines
    ]


def columns(runs: Sequence[Run]) -> list[str]:
    """Group, number of tasks, "mean / median" of each run; of a single run also what is known of
    its mean's interval and its metrics.
    """
    names = ["", "tasks", *(run.name for run in runs)]
    if len(runs) > 1:
        return names
    lines = runs[0].lines.values()
    has_intervals = any(map(_interval, lines))
    has_metrics = len(set(map(_metric, lines))) > 1
    return names + ["interval"] * has_intervals + ["metric"] * has_metrics


def _interval(line: Mapping[str, Any]) -> str:
    return " to ".join(f"{100 * share:.1f}" for share in line.get("mean_interval") or ())


def _metric(line: Mapping[str, Any]) -> str:
    return (line.get("metric") or "").replace("_", " ")


_MORE = {"interval": _interval, "metric": _metric}


def _notes(runs: Sequence[Run]) -> str:
    """How the numbers came about."""
    settings = runs[0].content["settings"]
    rule = aggregation.AVERAGES[settings.get("average", "tasks")]
    found, how = f"mean / median over templates; all tasks: {rule}", settings.get("bootstrap")
    if "interval" in columns(runs):
        found += (
            f"; interval of the mean: {100 * how['level']:g} % of {how['resamples']} bootstrap "
            f"resamples over {how['over']}"
        )
    return found


def show(runs: Sequence[Run], console: rich.console.Console | None = None) -> None:
    """Prints the table."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        show_footer=True,
        padding=(0, 1, 0, 0),
    )
    sizes = [run.size().replace(" (", "\n(") for run in runs]
    footers = ["trainable", "", *sizes]
    for name, footer in itertools.zip_longest(columns(runs), footers, fillvalue=""):
        justify = "right" if name else "left"
        table.add_column(name, footer=footer, no_wrap=name != "tasks", justify=justify)
    body = [[cell.replace(" / ", "/") for cell in row] for row in rows(runs)]
    for row in body[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*body[-1], style="bold")
    console = console or _console()
    console.print(title(runs), style="bold", highlight=False)
    console.print(table)
    console.print(_notes(runs), style="dim", highlight=False)


def markdown(runs: Sequence[Run]) -> str:
    """The same table for a document."""
    lines = [f"### {title(runs)}", "", f"Per cent; {_notes(runs)}.", ""]
    names = columns(runs)
    lines += ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    *groups, overall = rows(runs)
    lines += ["| " + " | ".join(row) + " |" for row in groups]
    lines.append("| " + " | ".join(f"**{cell}**" if cell else "" for cell in overall) + " |")
    sizes = [run.size() for run in runs] + [""] * (len(names) - 2 - len(runs))
    lines.append("| trainable | | " + " | ".join(sizes) + " |")
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
    from moe_peft.reports import picture  # Imports matplotlib.
    from moe_peft.runtime import json_files

    stem = pathlib.Path(folder) / runs[0].content["mixture"]
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    json_files.write_text(paths[0], markdown(runs))
    json_files.write_json(paths[1], to_json(runs))
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
