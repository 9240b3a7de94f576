"""Evaluated runs as one table, for a terminal and as Markdown. Numbers are per cent."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import rich.console

from moe_peft.evaluation import aggregation
from moe_peft.runtime import tables

OVERALL = "all tasks"


@dataclasses.dataclass(frozen=True)
class Run:
    """One column of a table."""

    name: str  # what the column is called
    content: Mapping[str, Any]  # of the run's results.json

    @property
    def lines(self) -> dict[str, Mapping[str, Any]]:
        """Averages by group, all tasks last."""
        results = self.content["results"]
        return {**results["groups"], OVERALL: results["overall"]}

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.content["run"]["trainable_parameters"]

    def size(self) -> str:
        """The trainable parameters for a person: "74,880 (1.2 %)"."""
        if not self.trainable:
            return "0"
        run = self.content["run"]
        # Of the network's own; results of version 0.1 do not say how many those are.
        own = run.get("network_parameters", run["total_parameters"] - self.trainable)
        percent = 100 * self.trainable / (own or self.trainable)
        return f"{self.trainable:,} ({percent:.{2 if percent < 1 else 1}f} %)"


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
    table = tables.grid(*columns(runs), left=("",), show_footer=True, padding=(0, 1, 0, 0))
    footers = ["trainable", "", *(run.size().replace(" (", "\n(") for run in runs)]
    for column, footer in zip(table.columns, footers, strict=False):
        column.footer, column.no_wrap = footer, column.header != "tasks"
    *body, overall = [[cell.replace(" / ", "/") for cell in row] for row in rows(runs)]
    for row in body:
        table.add_row(*row)
    table.add_section()
    table.add_row(*overall, style="bold")
    console = console or tables.wide_console(140)
    console.print(title(runs), style="bold", highlight=False)
    console.print(table)
    console.print(_notes(runs), style="dim", highlight=False)


def markdown(runs: Sequence[Run]) -> str:
    """The same table for a document."""
    names = columns(runs)
    *groups, overall = rows(runs)
    bold = [f"**{cell}**" if cell else "" for cell in overall]
    sizes = ["trainable", "", *(run.size() for run in runs)]
    sizes += [""] * (len(names) - len(sizes))
    note = f"Per cent; {_notes(runs)}."
    return tables.markdown_table(title(runs), note, names, [*groups, bold, sizes])


def _cell(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['mean']:.1f} / {100 * summary['median']:.1f}"
