"""What all pictures share: colours, bare axes, and one way to be saved."""

from collections.abc import Sequence
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure

from moe_peft import errors

# Distinct in print and by the colour-blind (Okabe-Ito). Grey is kept for what trains nothing.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
# After them where there are more names than colours (mostly Tol's muted scheme).
_MORE = ("#332288", "#882255", "#8c564b", "#999933", "#000000", "#aa4499", "#44aa99", "#117733")
GREY = "#9aa0a6"
INK = "#333333"

_DPI = 160


def by_name(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each name; beyond fifteen they repeat."""
    colors = COLORS + _MORE
    return {name: colors[number % len(colors)] for number, name in enumerate(names)}


def clean(axes: axes_lib.Axes, grid: str = "y") -> None:
    """Leaves of a plot's frame only what helps reading: the lower line and a light grid."""
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def title(axes: axes_lib.Axes, text: str) -> None:
    """Sets the title as all pictures have it, left above the plot."""
    axes.set_title(text, loc="left", fontsize=11, color=INK, pad=10)


def heading(fig: figure.Figure, text: str) -> None:
    """Sets the title of a picture of several plots, left above them."""
    fig.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)


def legend(fig: figure.Figure, count: int, note: str, *handles: Any) -> None:
    """Sets the legend below the plots, `count` names a line, under a note."""
    look = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "title_fontsize": 8}
    fig.legend(*handles, loc="outside lower center", ncols=count, title=note, **look)


def color_bar(bar: Any, text: str) -> None:
    """Gives a colour bar its name."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=INK)
    bar.set_label(text, fontsize=8, color=INK)


def save(fig: figure.Figure, path: pathlib.Path | str) -> None:
    """Writes a .png, .pdf or .svg file; raises UserError where that is impossible."""
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=_DPI)
    except OSError as error:
        raise errors.UserError(f"{path} cannot be written: {error}.") from error
