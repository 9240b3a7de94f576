"""The Pareto picture: parameters trained for a new task against the score."""

from collections.abc import Sequence
import pathlib
import re

from matplotlib import figure, ticker
import numpy as np

from moe_peft.reports import labels, pareto, style

_MARKERS = "os^Dvp*"


def draw(rows: Sequence[pareto.Row], title: str, path: pathlib.Path | str) -> None:
    """Writes a .png, .pdf or .svg: points are means over seeds, bars one standard deviation.

    Rows, at least one, that train nothing become lines across.
    """
    fig = figure.Figure(figsize=(7.6, 5.0), layout="constrained")
    axes = fig.add_subplot()
    trained = [row for row in rows if row.trainable]
    untrained = [row for row in rows if not row.trainable]
    points = list(zip(_side_by_side(trained), trained, strict=True))
    families = list(dict.fromkeys(map(_family, trained)))
    look = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
    look |= {"elinewidth": 1, "capsize": 2.5, "zorder": 4}
    for x, row in points:
        number, std = families.index(_family(row)), None if row.std is None else 100 * row.std
        look["color"] = style.COLORS[number % len(style.COLORS)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.errorbar(x, 100 * row.mean, yerr=std, fmt=marker, **look)
    corners = _stairs(pareto.front(trained))
    axes.plot(*np.reshape(corners, (-1, 2)).T, color=style.INK, linewidth=1, alpha=0.5, zorder=2)
    for row in untrained:
        axes.axhline(100 * row.mean, color=style.GREY, linewidth=1, linestyle="--", zorder=1)

    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _count(value)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
    style.clean(axes, "both")
    style.title(axes, title)
    note = "parameters trained for a new task, equal numbers side by side; "
    note += "bars: one standard deviation over seeds; line: Pareto front"
    axes.set_xlabel(note, fontsize=8, color=style.INK)
    axes.autoscale_view()
    (left, right), bottom_and_top = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=bottom_and_top)
    across = [[(left, 100 * row.mean), (right, 100 * row.mean)] for row in untrained]
    ends = lambda row: (100 * (row.mean - row.std), 100 * (row.mean + row.std))
    bars = [[(x, y) for y in ends(row)] for x, row in points if row.std is not None]
    centers = [(x, 100 * row.mean) for x, row in points] + [line[0] for line in across]
    names = [row.name for row in (*trained, *untrained)]
    labels.place(axes, centers, names, obstacles=[*bars, *across, corners])
    style.save(fig, path)


def _side_by_side(rows: Sequence[pareto.Row]) -> list[float]:
    """Where points stand: at their parameters, or a little aside if they would hide another."""
    if not rows:
        return []
    numbers = [row.trainable for row in rows]
    means = [row.mean for row in rows]
    width = 0.016 * max(np.log10(max(numbers) / min(numbers)), 1.0)  # decades
    height = 0.03 * max(np.ptp(means), 0.01)
    found: list[tuple[float, float, float]] = []  # x, lower and upper end
    for row in rows:
        reach = max(row.std or 0.0, height)
        low, high = row.mean - reach, row.mean + reach
        for aside in sorted(range(-len(rows), len(rows) + 1), key=lambda n: (abs(n), -n)):
            x = row.trainable * 10 ** (aside * width)
            near = [each for each in found if abs(np.log10(each[0] / x)) < 0.9 * width]
            if all(high < other[1] or low > other[2] for other in near):
                break
        found.append((x, low, high))
    return [x for x, _, _ in found]


def _family(row: pareto.Row) -> str:
    """ "mhr" of "mhr-z": variants of one method look alike."""
    return re.split(r"[-_ ]", row.name)[0].lower()


def _stairs(best: Sequence[pareto.Row]) -> list[tuple[float, float]]:
    """Corners of the front: a score is reached from its number of parameters on."""
    corners = []
    for row in best:
        if corners:
            corners.append((row.trainable, corners[-1][1]))
        corners.append((row.trainable, 100 * row.mean))
    return corners


def _count(value: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
