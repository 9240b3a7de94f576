"""Standard output as rich writes to it."""

import rich.console


def console(width: int) -> rich.console.Console:
    """A console for standard output; a file or a pipe gets lines of `width` characters."""
    found = rich.console.Console()
    return found if found.is_terminal else rich.console.Console(width=width)
