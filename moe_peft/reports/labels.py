"""Names next to points, moved until they cover neither each other nor a point."""

from collections.abc import Sequence
import itertools

from jaxtyping import Float
from matplotlib import axes as axes_lib
from matplotlib import patheffects, transforms
from matplotlib.backends import backend_agg
import numpy as np

from moe_peft.reports import style

# Directions in the order of preference, (x, y), and distances in points.
_DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1))
_DISTANCES = (7, 11, 16, 22, 30, 40, 52, 66)
_LEADER_FROM = 14  # points: labels this far away get a line to their point
# What a place costs, in square pixels of covered things.
_COST_OF_DISTANCE = 5.0  # for each point (1/72 inch)
_COST_OF_DOUBT = 250.0  # nearer to another point than to its own
_MARGIN = 1.5  # pixels around a label


def place(
    axes: axes_lib.Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    obstacles: Sequence[Sequence[tuple[float, float]]] = (),
    radius: float = 5.0,
    fontsize: float = 8,
) -> list[transforms.Bbox]:
    """Writes each name near its point and returns the names' boxes, in pixels.

    Labels are placed one by one where they cover least, near their point, and nearer to it than to
    any other. Limits and layout of the axes have to be final. Points, of that radius in points, and
    obstacles, polylines such as error bars, are in data coordinates.
    """
    fig, pixels = axes.figure, axes.figure.dpi / 72
    renderer = backend_agg.FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # Labels must not move what they were fitted to.
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    centers = to_pixels(np.array(points, float))
    taken = [np.hstack([centers - radius * pixels, centers + radius * pixels])]
    taken += [_boxes_along(to_pixels(np.array(line, float))) for line in obstacles if len(line)]
    frame = np.array(axes.get_window_extent(renderer).extents)
    distance = np.repeat(_DISTANCES, len(_DIRECTIONS))
    direction = np.tile(np.array(_DIRECTIONS, float), (len(_DISTANCES), 1))
    steps = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    steps *= pixels * distance[:, None]
    for center, name in zip(centers, names, strict=True):
        look = {"fontsize": fontsize, "color": style.INK, "zorder": 5, "va": "bottom"}
        text = axes.text(*to_data(center), name, **look)
        size = np.array(text.get_window_extent(renderer).size) + 2 * _MARGIN
        middles = center + steps + direction * size / 2  # the nearest side is that far away
        boxes = np.hstack([middles - size / 2, middles + size / 2])
        cost = _overlap(boxes[:, None], np.vstack(taken)).sum(1) - _overlap(boxes, frame)
        others = [other for other in centers if not np.array_equal(other, center)]
        nearest = np.min([_gap(boxes, other) for other in others], axis=0, initial=np.inf)
        cost += _COST_OF_DISTANCE * distance
        cost += _COST_OF_DOUBT * (nearest < 1.2 * _gap(boxes, center))
        box = boxes[best := np.argmin(cost)]
        taken.append(box[None])
        text.set_position(to_data(box[:2] + _MARGIN))
        text.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="white")])
        if distance[best] >= _LEADER_FROM:
            ends = to_data([center, np.clip(center, box[:2], box[2:])])
            look = {"color": style.GREY, "linewidth": 0.6, "zorder": 1.5}
            axes.plot(*ends.T, scalex=False, scaley=False, **look)
    return [transforms.Bbox.from_extents(box[0]) for box in taken[len(taken) - len(names) :]]


def _gap(boxes: Float[np.ndarray, "n 4"], point: Float[np.ndarray, "2"]) -> Float[np.ndarray, "n"]:
    """Distances of boxes from a point."""
    return np.linalg.norm(np.clip(point, boxes[:, :2], boxes[:, 2:]) - point, axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that boxes (left, bottom, right, top) have in common with others."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=-1)


def _boxes_along(line: Float[np.ndarray, "n 2"], length: float = 6.0) -> Float[np.ndarray, "m 4"]:
    """Small boxes along a line in pixels."""
    boxes = [np.empty((0, 4))]
    for start, end in itertools.pairwise(line):
        count = max(int(np.linalg.norm(end - start) / length), 1)
        cuts = start + (end - start) * np.linspace(0, 1, count + 1)[:, None]
        low, high = np.minimum(cuts[:-1], cuts[1:]), np.maximum(cuts[:-1], cuts[1:])
        boxes.append(np.hstack([low - 0.5, high + 0.5]))
    return np.vstack(boxes)
