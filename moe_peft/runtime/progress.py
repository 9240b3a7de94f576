"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere."""

from collections.abc import Callable, Iterator
import contextlib
import sys
import time
from typing import Protocol

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Counts what is done."""

    def advance(self, count: int) -> None:
        """`count` more are done."""
        ...


class Silent:
    """Shows nothing."""

    def advance(self, count: int) -> None:
        """See `Progress`."""


@contextlib.contextmanager
def shown(what: str, total: int) -> Iterator[Progress]:
    """A progress of `total` examples on standard error."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        lines = _Lines(what, total, lambda text: print(text, file=sys.stderr, flush=True))
        yield lines
        lines.finish()
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield _Bar(lambda count: bar.advance(task, count))


class _Bar:
    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance


class _Lines:
    def __init__(self, what: str, total: int, say: Callable[[str], None]):
        self._what, self._total, self._say = what, total, say
        self._done, self._started = 0, time.monotonic()
        self._said = self._started

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            self._say(f"{self._what}: {self._done}/{self._total}, {rate:.0f}/s, {left:.0f} s left")

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        self._say(f"{self._what}: {self._done}/{self._total} in {seconds:.1f} s")
