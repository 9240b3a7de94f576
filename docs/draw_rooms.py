"""Draws docs/rooms.svg: the rooms of the package, their imports, and the way of a batch.

    python docs/draw_rooms.py

Rooms and arrows are read from the source by tests/test_architecture.py, which also holds that every
arrow runs down. A room's row is one above the highest room that it imports.
"""

import functools
import importlib.util
import pathlib

import matplotlib
from matplotlib import figure, patches

HERE = pathlib.Path(__file__).parent
BATCH = (  # room, what happens to a batch there
    ("tasks", "rows of the benchmarks' files"),
    ("data", "token ids, mixed, packed: a batch"),
    ("training", "one step: loss, gradients, update"),
    ("models", "the T5 computes the loss"),
    ("patching", "an adapter enters at each site"),
    ("routing", "weights over experts"),
    ("adapters", "the experts' outputs, mixed"),
    ("methods", "which leaves the update changes"),
    ("weights", "the checkpoint"),
    ("evaluation", "answers and scores"),
    ("reports", "tables and pictures"),
)
WIDTH, HEIGHT, GAP_X, GAP_Y = 2.6, 0.85, 0.3, 0.6
INK, GREY, WAY = "#22313f", "#b8c0c8", "#c0392b"


@functools.cache
def architecture():
    """The module tests/test_architecture.py."""
    path = HERE.parent / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rooms() -> dict[str, set[str]]:
    """Every room with the rooms it imports."""
    found = {room: set() for room in architecture().FLOORS if room != "__main__"}
    for importer, imported in architecture().graph().items():
        if importer == "moe_peft" or architecture().room(importer) not in found:
            continue
        room = architecture().room(importer)
        found[room] |= {architecture().room(name) for name in imported} - {room}
    return found


def level(room: str, imports: dict[str, set[str]]) -> int:
    """The row of a room, from 0."""
    return 1 + max((level(each, imports) for each in imports[room]), default=-1)


def needed(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others: what is drawn."""

    @functools.cache
    def below(room):
        return imports[room].union(*map(below, imports[room]))

    return {
        room: {to for to in found if not any(to in below(other) for other in found)}
        for room, found in imports.items()
    }


def what(room: str) -> str:
    """The first line of a room's docstring."""
    text = architecture().modules()[f"moe_peft.{room}"].read_text()
    return text.split('"""')[1].split("\n")[0]


def places(imports: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """The middle of every room's box; a room stands near the rooms it imports."""
    rows: dict[int, list[str]] = {}
    for room in imports:
        rows.setdefault(level(room, imports), []).append(room)
    widest = max(map(len, rows.values())) * (WIDTH + GAP_X)
    found: dict[str, tuple[float, float]] = {}
    for row in sorted(rows):
        mean = lambda room: sum(found[r][0] for r in imports[room]) / max(len(imports[room]), 1)
        order = sorted(rows[row], key=mean)
        space = widest / len(order)
        for number, room in enumerate(order):
            found[room] = (space * (number + 0.5), row * (HEIGHT + GAP_Y))
    return found


def draw(path: pathlib.Path) -> None:
    """Writes the picture."""
    imports = rooms()
    where = places(imports)
    right = max(x for x, _ in where.values()) + WIDTH
    top = max(y for _, y in where.values()) + HEIGHT
    fig = figure.Figure(figsize=(right * 0.85, (top + 1.4) * 0.85))
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.4, right), ylim=(-2.2, top))
    axes.axis("off")
    for room, found in needed(imports).items():
        for other in found:
            (x, y), (to_x, to_y) = where[room], where[other]
            arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0}
            start, end = (x, y - HEIGHT / 2), (to_x, to_y + HEIGHT / 2)
            axes.annotate("", end, start, arrowprops=arrow, zorder=1)
    for room, (x, y) in where.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        box = patches.FancyBboxPatch(
            corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=0.1", fc="white", ec=INK, zorder=2
        )
        axes.add_patch(box)
        axes.text(x, y + 0.24, room, ha="center", va="center", weight="bold", color=INK, size=10)
        axes.text(x, y - 0.13, _wrapped(what(room)), ha="center", va="center", color=INK, size=6.5)
    _draw_batch(axes, where, right)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rooms"}):
        fig.savefig(path, metadata={"Date": None, "Description": arrows(imports)})


def arrows(imports: dict[str, set[str]]) -> str:
    """What the picture shows, in words; a test compares it with the source."""
    return "; ".join(f"{room} > {' '.join(sorted(to))}" for room, to in needed(imports).items())


def _draw_batch(axes, where, right) -> None:
    """Numbers in circles at the rooms, and what each means below the picture."""
    columns = 4
    for number, (room, text) in enumerate(BATCH, start=1):
        x, y = where[room]
        mark = {"boxstyle": "circle,pad=0.25", "fc": WAY, "ec": "white"}
        style = {"color": "white", "size": 6.5, "ha": "center", "va": "center", "zorder": 4}
        axes.text(x - WIDTH / 2, y + HEIGHT / 2, str(number), bbox=mark, **style)
        place = right / columns * ((number - 1) % columns)
        line = -1.15 - 0.35 * ((number - 1) // columns)
        axes.text(place, line, str(number), bbox=mark, **style)
        axes.text(place + 0.22, line, f"{room}: {text}", color=INK, size=7, va="center")
    axes.text(-0.2, -0.82, "The way of a batch", color=WAY, weight="bold", size=8)


def _wrapped(text: str, width: int = 38) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines[:3])


if __name__ == "__main__":
    draw(HERE / "rooms.svg")
