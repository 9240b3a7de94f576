"""Tables that commands print, and the same for a document."""

from collections.abc import Collection, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table


def wide_console(width: int) -> rich.console.Console:
    """Standard output; a file or a pipe gets lines of so many characters or more."""
    console = rich.console.Console()
    if not console.is_terminal:  # rich would assume 80 columns
        console.width = max(console.width, width)
    return console


def grid(
    *names: str, left: Collection[str], overflow: Any = "ellipsis", **how: Any
) -> rich.table.Table:
    """Returns a `rich` table without rows; columns in `left` hold words, the others numbers."""
    table = rich.table.Table(title_justify="left", box=rich.box.SIMPLE_HEAD, **how)
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", overflow=overflow)
    return table


def markdown_table(
    heading: str, note: str, names: Sequence[str], body: Sequence[Sequence[str]]
) -> str:
    """Returns a table for a document; its first column holds words, the others numbers."""
    head = [f"### {heading}", "", note, "", f"| {' | '.join(names)} |"]
    lines = [*head, "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])
