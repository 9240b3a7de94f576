"""Names beside points, moved until they cover neither each other nor a point."""

from collections.abc import Sequence
import itertools

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
    any other. Limits and layout of the axes have to be final.

    Args:
      axes: of a finished plot.
      points: in data coordinates.
      names: of the points.
      obstacles: polylines in data coordinates that labels should not cover, such as error bars.
      radius: of a point, in points.
      fontsize: of the names.
    """
    fig = axes.figure
    renderer = backend_agg.FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # Labels must not move what they were fitted to.
    pixels = fig.dpi / 72
    to_pixels = axes.transData.transform
    centers = to_pixels(np.array(points, float))
    blocked = [_square(center, radius * pixels) for center in centers]
    blocked += [box for line in obstacles for box in _boxes(to_pixels(np.array(line, float)))]
    frame, placed = axes.get_window_extent(renderer), []
    for center, name in zip(centers, names, strict=True):
        text = axes.annotate(
            name, center, xycoords="figure pixels", fontsize=fontsize, color=style.INK, zorder=5
        )
        size = text.get_window_extent(renderer)
        text.remove()
        others = [other for other in centers if not np.array_equal(other, center)]
        places = []
        for rank, (distance, direction) in enumerate(itertools.product(_DISTANCES, _DIRECTIONS)):
            box = _box(center, direction, distance * pixels, size)
            cost = _covered(box, [*blocked, *placed], frame) + _COST_OF_DISTANCE * distance
            gap = _gap(box, center)
            cost += _COST_OF_DOUBT * any(_gap(box, other) < 1.2 * gap for other in others)
            places.append((cost, rank, distance, box))
        _, _, distance, box = min(places, key=lambda each: each[:2])
        placed.append(box)
        to_data = axes.transData.inverted().transform
        x, y = to_data((box.x0 + _MARGIN, box.y0 + _MARGIN))
        text = axes.text(x, y, name, fontsize=fontsize, color=style.INK, zorder=5, va="bottom")
        text.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="white")])
        if distance >= _LEADER_FROM:
            ends = to_data([center, np.clip(center, (box.x0, box.y0), (box.x1, box.y1))])
            axes.plot(
                *ends.T, color=style.GREY, linewidth=0.6, zorder=1.5, scalex=False, scaley=False
            )
    return placed


def _box(center, direction, distance, size) -> transforms.Bbox:
    """The box of a label whose nearest side is `distance` from the point."""
    width, height = size.width + 2 * _MARGIN, size.height + 2 * _MARGIN
    step = np.array(direction) / np.linalg.norm(direction)
    middle = center + step * distance + np.array(direction) * (width / 2, height / 2)
    return transforms.Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)


def _gap(box: transforms.Bbox, point: np.ndarray) -> float:
    """Distance of a point from a box, in pixels."""
    nearest = np.clip(point, (box.x0, box.y0), (box.x1, box.y1))
    return float(np.linalg.norm(nearest - point))


def _square(center, radius) -> transforms.Bbox:
    return transforms.Bbox.from_bounds(*(center - radius), 2 * radius, 2 * radius)


def _boxes(line: np.ndarray, length: float = 6.0) -> list[transforms.Bbox]:
    """Small boxes along a line in pixels."""
    boxes = []
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(int(np.linalg.norm(end - start) / length), 1)
        cuts = start + (end - start) * np.linspace(0, 1, count + 1)[:, None]
        boxes += [
            transforms.Bbox([np.minimum(a, b) - 0.5, np.maximum(a, b) + 0.5])
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
    return boxes


def _covered(box: transforms.Bbox, others: Sequence[transforms.Bbox], frame) -> float:
    """Area of a box that lies on others or outside of the frame, in square pixels."""
    area = sum(_area(transforms.Bbox.intersection(box, other)) for other in others)
    return area + box.width * box.height - _area(transforms.Bbox.intersection(box, frame))


def _area(box: transforms.Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height
