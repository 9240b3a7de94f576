"""Pictures of gradient alignment: the matrix of tasks, and its mean over training."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from jaxtyping import Float
from matplotlib import colors as colors_lib
from matplotlib import figure
import numpy as np

from moe_peft.reports import recorded_run, style
from moe_peft.training.monitors import alignment

Records = Sequence[Mapping[str, Any]]


def draw_matrices(
    records: Records, tasks: recorded_run.Tasks, title: str, path: pathlib.Path | str
) -> None:
    """Writes the matrix of cosines at the first, middle and last record, tasks by group.

    Records are those of `alignment`, oldest first, all of the same tasks in the order of the rows.
    """
    order = tasks.by_group()
    shown = [records[i] for i in sorted({0, (len(records) - 1) // 2, len(records) - 1})]
    size = min(max(0.13 * len(order), 1.8), 6.0)  # inches
    width = max(len(shown) * (size + 0.2) + 2.4, 6.0)
    fig = figure.Figure(figsize=(width, size + 0.8), layout="constrained")
    style.heading(fig, title)
    all_axes = fig.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    matrices = [_without_diagonal(record["cosines"][np.ix_(order, order)]) for record in shown]
    strongest = [np.max(np.abs(each[~np.isnan(each)]), initial=0.0) for each in matrices]
    top = max(*strongest, 0.05)
    norm = colors_lib.Normalize(-top, top)
    for axes, record, matrix in zip(all_axes, shown, matrices, strict=True):
        axes.set_facecolor("#eeeeee")  # Cells without a cosine, and the diagonal.
        image = axes.imshow(matrix, cmap="RdBu", norm=norm, interpolation="nearest")
        found = alignment.summarize(record["cosines"]).get("mean_cosine")
        mean = "none" if found is None else f"{found:+.3f}"
        axes.set_title(f"step {record['step']:,}: mean {mean}", fontsize=9, color=style.INK)
        for _, _, end in tasks.spans()[:-1]:
            axes.axhline(end - 0.5, color=style.GREY, linewidth=0.5)
            axes.axvline(end - 0.5, color=style.GREY, linewidth=0.5)
        axes.set_xticks([])
        axes.tick_params(length=0, colors=style.INK)
        axes.spines[:].set_color("#bbbbbb")
    font = float(np.clip(72 * size / len(order) * 0.75, 4.0, 8.0))
    all_axes[0].set_yticks(range(len(order)), [tasks.names[i] for i in order], fontsize=font)
    bar = fig.colorbar(image, ax=list(all_axes), shrink=0.7, aspect=25, pad=0.01)
    style.color_bar(bar, "cosine of the tasks' gradients")
    style.save(fig, path)


def draw_course(runs: Mapping[str, Records], title: str, path: pathlib.Path | str) -> None:
    """Writes the mean cosine over training, one line a run (records of `alignment` by label)."""
    fig = figure.Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = fig.add_subplot()
    colors = style.by_name(list(runs))
    for label, records in runs.items():
        steps = [record["step"] for record in records]
        summaries = [alignment.summarize(record["cosines"]) for record in records]
        means = [found.get("mean_cosine", np.nan) for found in summaries]
        marker = "o" if len(steps) <= 12 else None
        look = {"color": colors[label], "linewidth": 1.8, "marker": marker, "ms": 4}
        axes.plot(steps, means, label=label, **look)
    axes.axhline(0, color="#bbbbbb", linewidth=1, zorder=1)
    style.clean(axes)
    style.title(axes, title)
    axes.set_xlabel("step", fontsize=9, color=style.INK)
    axes.set_ylabel("mean cosine between tasks", fontsize=9, color=style.INK)
    drawn = {tuple(records[-1]["tasks"]) for records in runs.values()}
    counts = sorted({len(tasks) for tasks in drawn})
    note = f"{' or '.join(map(str, counts))} tasks"
    if len(drawn) > 1:
        note += "; NOT the same ones in all runs"
    style.legend(fig, min(len(runs), 4), f"gradients of adapter parameters, {note}")
    style.save(fig, path)


def _without_diagonal(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    matrix = matrix.copy()
    np.fill_diagonal(matrix, np.nan)
    return matrix
