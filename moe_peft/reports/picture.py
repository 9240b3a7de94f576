"""The results picture: one cluster of bars per group, all tasks separate at the right."""

from collections.abc import Sequence
import pathlib

from matplotlib import figure, ticker
import numpy as np

from moe_peft.evaluation import table
from moe_peft.reports import style


def draw(runs: Sequence[table.Run], path: pathlib.Path | str) -> None:
    """Writes comparable runs as .png, .pdf or .svg: bars are template means, lines medians."""
    groups = list(runs[0].lines)
    # The last cluster, all tasks, stands separate and is wider: its bars carry numbers.
    places = np.arange(len(groups), dtype=float)
    places[-1] += 0.75
    scales = np.where(np.arange(len(groups)) == len(groups) - 1, 1.75, 1.0)
    widths = 0.8 / len(runs) * scales

    fig = figure.Figure(figsize=(max(6.5, 1.6 + 0.72 * len(groups)), 4.4), layout="constrained")
    axes = fig.add_subplot()
    for number, (run, color) in enumerate(zip(runs, _colors(runs), strict=True)):
        means = [100 * line["mean"] for line in run.lines.values()]
        medians = [100 * line["median"] for line in run.lines.values()]
        x = places + (number - (len(runs) - 1) / 2) * widths
        label = f"{run.name}   {run.size() if run.trainable else 'nothing trained'}"
        axes.bar(x, means, widths * 0.92, color=color, label=label, zorder=2)
        half = widths * 0.36
        axes.hlines(medians, x - half, x + half, color=style.INK, linewidth=1, zorder=3)
        top = max(means[-1], medians[-1])
        look = {"ha": "center", "fontsize": 7, "color": style.INK}
        offset = {"xytext": (0, 2), "textcoords": "offset points"}
        axes.annotate(f"{means[-1]:.1f}", (x[-1], top), **offset, **look)
    axes.axvline(places[-2] + 0.6, color="#dddddd", linewidth=1, zorder=1)

    axes.set_xticks(places, groups, rotation=30, ha="right", rotation_mode="anchor")
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.85)
    axes.set_ylim(0, None)
    axes.margins(y=0.08)
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
    style.clean(axes)
    style.title(axes, table.title(runs).replace(", per cent", ""))
    note = "bar: mean, line: median over templates; trainable parameters next to the name"
    style.legend(fig, min(len(runs), 3), note)
    style.save(fig, path)


def _colors(runs: Sequence[table.Run]) -> list[str]:
    trained = [run for run in runs if run.trainable]
    by_name = {run.name: style.COLORS[i % len(style.COLORS)] for i, run in enumerate(trained)}
    return [by_name.get(run.name, style.GREY) for run in runs]
