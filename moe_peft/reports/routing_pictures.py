"""Pictures of task routing: weights of tasks and skills, a tree of tasks, the course of it all."""

from collections.abc import Mapping, Sequence
import pathlib
import re

from jaxtyping import Float
from matplotlib import figure, patches
import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

from moe_peft import errors
from moe_peft.reports import recorded_run, style
from moe_peft.training.monitors import task_routing

Weights = Mapping[str, Float[np.ndarray, "n p s"]]

NUM_SELECTORS, NUM_SPLITS = 8, 4  # shown unless others are asked for
_BLOCKS_PER_ROW = 4
_NAMED_TASKS = 48  # as many are still labelled one by one next to a heatmap

_MEANING = {
    "entropy": "entropy, as a share of log(skills)",
    "sparsity": "weights below half an equal share",
    "max_weight": "largest weight of a task",
}


def choose_selectors(
    weights: Weights, layers: str | None = None, splits: Sequence[int] | None = None
) -> dict[str, Float[np.ndarray, "n p s"]]:
    """Returns the selectors and splits that are to be drawn; a UserError if none is left.

    `layers` is a regular expression found in the selectors' names; None takes some that are evenly
    spread over the model. `splits` are numbers; None takes the first few.
    """
    names = list(weights)
    if layers is None:
        places = np.linspace(0, len(names) - 1, min(len(names), NUM_SELECTORS)).round().astype(int)
        chosen = [names[place] for place in places]
    else:
        try:
            chosen = [name for name in names if re.search(layers, name)]
        except re.error as error:
            raise errors.UserError(f"{layers!r} is not a regular expression: {error}.") from error
        if not chosen:
            known = f"There are {len(names)}: {', '.join(names[:3])}, ..."
            near = errors.near(layers, names)
            raise errors.UserError(f"No selector is called {layers!r}.{near} {known}")
    num_splits = next(iter(weights.values())).shape[1]
    splits = range(min(num_splits, NUM_SPLITS)) if splits is None else splits
    if not splits or not all(0 <= split < num_splits for split in splits):
        known = f"the splits 0 to {num_splits - 1}"
        raise errors.UserError(f"The selectors have {known}; got {list(splits)}.")
    return {name: weights[name][:, list(splits)] for name in chosen}


def draw_weights(
    weights: Weights,
    tasks: recorded_run.Tasks,
    title: str,
    path: pathlib.Path | str,
    splits: Sequence[int] | None = None,
) -> None:
    """Writes small multiples: tasks down, skills across, a strip for each split of each selector.

    Tasks are in the order of the weights' rows; `splits` are the numbers of those in `weights`,
    None for 0, 1, ...
    """
    num_tasks, num_splits, num_skills = next(iter(weights.values())).shape
    labels = [""] if num_splits == 1 else [str(split) for split in splits or range(num_splits)]
    places, names = _task_labels(tasks)
    num_columns = min(len(weights), _BLOCKS_PER_ROW)
    num_rows = -(-len(weights) // num_columns)
    block_width = max(0.055 * num_skills, 0.28) * num_splits + 0.25  # inches
    label_width, bar_width = 0.15 + 0.065 * max(map(len, names)), 0.8
    height = num_rows * (min(max(0.12 * num_tasks, 2.0), 5.0) + 0.75) + 0.7
    width = max(num_columns * block_width + label_width + bar_width, 6.0)
    fig = figure.Figure(figsize=(width, height), layout="constrained")
    style.heading(fig, title)
    left, right = fig.subfigures(1, 2, width_ratios=[width - bar_width, bar_width])
    widths = [block_width + label_width] + [block_width] * (num_columns - 1)
    blocks = list(left.subfigures(num_rows, num_columns, squeeze=False, width_ratios=widths).flat)
    # Equal shares are no darker than the middle of the scale.
    top = max(2 / num_skills, *(float(np.max(each)) for each in weights.values()))
    for number, (block, (name, found)) in enumerate(zip(blocks, weights.items(), strict=False)):
        block.suptitle(_two_lines(name), fontsize=8, color=style.INK)
        strips = block.subplots(1, num_splits, squeeze=False, sharey=True)[0]
        for place, axes in enumerate(strips):
            image = _draw_strip(axes, found[tasks.by_group(), place], top, labels[place], tasks)
        strips[0].set_yticks([])
        if number % num_columns == 0:
            strips[0].set_yticks(places, names, fontsize=8 if len(names) < num_tasks else 6.5)
            strips[0].tick_params(labelleft=True)
    for spare in blocks[len(weights) :]:
        spare.set_visible(False)
    bar = fig.colorbar(image, cax=right.add_axes((0.1, 0.25, 0.16, 0.5)))
    style.color_bar(bar, "weight")
    bar.ax.axhline(1 / num_skills, color="#d55e00", linewidth=1.5)
    what = "Skills stand side by side" + (", in a strip for each split" if num_splits > 1 else "")
    note = f"{what}; the mark at the scale is an equal share, 1/{num_skills}."
    fig.supxlabel(note, x=0.01, ha="left", fontsize=8, color=style.INK)
    style.save(fig, path)


def _draw_strip(axes, weights: Float[np.ndarray, "n s"], top: float, label: str, tasks):
    """Draws weights of tasks by group over skills; returns the image."""
    look = {"aspect": "auto", "interpolation": "nearest", "cmap": "Blues"}
    image = axes.imshow(weights, vmin=0.0, vmax=top, **look)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=style.INK, labelleft=False)
    axes.set_xlabel(label, fontsize=7, color=style.INK, labelpad=2)
    axes.spines[:].set_color("#bbbbbb")
    for _, _, end in tasks.spans()[:-1]:
        axes.axhline(end - 0.5, color=style.INK, linewidth=0.5)
    return image


def distances(weights: Weights) -> Float[np.ndarray, "pairs"]:
    """Returns how differently two tasks route, in [0, 1], for every pair (as `pdist` orders them).

    The share of weight that one task puts on other skills than the other does (total variation
    distance), averaged over selectors and splits.
    """
    rows = [np.asarray(each, np.float64).reshape(len(each), -1) for each in weights.values()]
    total = sum(distance.pdist(each, "cityblock") for each in rows)
    return total / (2 * sum(each.shape[1] for each in weights.values()))


def draw_tree(
    weights: Weights, tasks: recorded_run.Tasks, title: str, path: pathlib.Path | str
) -> list[str]:
    """Writes a dendrogram of tasks by routing and returns the leaves' names from top to bottom.

    Average linkage of `distances`. A leaf's square and the branches of one group only are in the
    group's colour. Tasks, at least two, are in the order of the weights' rows.
    """
    if len(tasks.names) < 2:
        raise errors.UserError("A tree of tasks needs at least two of them.")
    linkage = hierarchy.linkage(distances(weights), "average", optimal_ordering=True)
    colors = style.by_name(sorted(set(tasks.groups)))
    inside = [{group} for group in tasks.groups]  # of each leaf, then of each branch
    for one, other, _, _ in linkage:
        inside.append(inside[int(one)] | inside[int(other)])
    color = lambda node: colors[min(inside[node])] if len(inside[node]) == 1 else style.GREY
    fig = figure.Figure(figsize=(7.0, 1.5 + 0.105 * len(tasks.names)), layout="constrained")
    axes = fig.add_subplot()
    look = {"orientation": "left", "labels": list(tasks.names), "link_color_func": color}
    leaves = hierarchy.dendrogram(linkage, ax=axes, **look)["leaves"]
    for line in axes.collections:
        line.set_linewidth(0.9)
    # Leaves stand at 5, 15, ...; their squares lie between the tree and the names.
    heights = 10 * np.arange(len(leaves)) + 5
    squares = {"s": 14, "marker": "s", "clip_on": False, "transform": axes.get_yaxis_transform()}
    axes.scatter(np.full(len(leaves), 1.008), heights, c=list(map(color, leaves)), **squares)
    axes.tick_params(axis="y", labelsize=6.5, length=0, pad=9, labelcolor=style.INK)
    axes.tick_params(axis="x", labelsize=8, length=0, colors=style.INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    note = "difference of routing: share of weight on other skills, mean over selectors"
    axes.set_xlabel(note, fontsize=8, color=style.INK)
    handles = [patches.Patch(color=color, label=name) for name, color in colors.items()]
    place = {"loc": "outside upper left", "ncols": min(len(handles), 6), "alignment": "left"}
    look = {"title_fontsize": 11, "frameon": False, "fontsize": 8, "labelcolor": style.INK}
    legend = fig.legend(handles=handles, title=title, **place, **look)
    legend.get_title().set_color(style.INK)
    style.save(fig, path)
    return [tasks.names[leaf] for leaf in reversed(leaves)]


def draw_course(
    runs: Mapping[str, Sequence[Mapping[str, object]]], title: str, path: pathlib.Path | str
) -> None:
    """Writes entropy, sparsity and largest weight over training, one line a run.

    Runs are records of `routing_course` by label. Lines are means over selectors, bands reach from
    the tenth to the ninetieth percentile of them.
    """
    fig = figure.Figure(figsize=(9.6, 3.6), layout="constrained")
    all_axes = fig.subplots(1, len(task_routing.STATISTICS))
    colors = style.by_name(list(runs))
    for axes, name in zip(all_axes, task_routing.STATISTICS, strict=True):
        for label, records in runs.items():
            steps = [record["step"] for record in records]
            values = np.stack([record[name] for record in records])
            low, high = np.percentile(values, [10, 90], axis=1)
            axes.fill_between(steps, low, high, color=colors[label], alpha=0.18, linewidth=0)
            look = {"linewidth": 1.8, "marker": "o" if len(steps) == 1 else None}
            axes.plot(steps, values.mean(axis=1), color=colors[label], label=label, **look)
        style.clean(axes)
        axes.set_title(_MEANING[name], fontsize=9, color=style.INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=style.INK)
        axes.tick_params(labelsize=8)
        axes.set_ylim(*_readable(*axes.get_ylim()))
        axes.ticklabel_format(useOffset=False)
    style.heading(fig, title)
    note = "line: mean over selectors, band: 10th to 90th percentile"
    style.legend(fig, min(len(runs), 4), note, *all_axes[0].get_legend_handles_labels())
    style.save(fig, path)


def _readable(bottom: float, top: float) -> tuple[float, float]:
    """Limits of shares that do not blow up a hair's breadth: a tenth at least, within 0 to 1."""
    middle, half = (bottom + top) / 2, max((top - bottom) / 2, 0.05)
    middle = np.clip(middle, half, 1.0 - half)
    return max(middle - half, 0.0) - 0.002, min(middle + half, 1.0) + 0.002


def _two_lines(name: str) -> str:
    """ "encoder/layers_0/attention/query" as "encoder 0" above "attention query"."""
    head = re.match(r"((?:encoder|decoder)(?:/[a-z]+_\d+)?)/?(.*)", name)
    if head is None:
        return name
    first, rest = head.groups()
    first = first.replace("/layers_", " ").replace("/", " ")
    rest = rest.replace("encoder_decoder_attention", "cross-attention")
    return f"{first}\n{rest.replace('/', ' ').replace('_attention', '-attention')}"


def _task_labels(tasks: recorded_run.Tasks) -> tuple[list[float], list[str]]:
    """(places, names) of every task, or where they are many of the groups."""
    if len(tasks.names) <= _NAMED_TASKS:
        return list(range(len(tasks.names))), [tasks.names[place] for place in tasks.by_group()]
    spans = tasks.spans()
    names = [f"{name} ({end - start})" for name, start, end in spans]
    return [(start + end - 1) / 2 for _, start, end in spans], names
