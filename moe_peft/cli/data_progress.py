"""How far preparing is: tasks, rows, rows per second, time left."""

from collections.abc import Iterator
import contextlib
import sys
import time

import rich.console
import rich.progress

from moe_peft.training import progress as training_progress

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts tasks and the rows that are written; what was there already costs no time.

    Attributes:
      num_tasks: to be done.
      work: rows that they are expected to have; 0 where nobody knows, then tasks are counted.
    """

    def __init__(self, what: str, num_tasks: int, work: int):
        self._what, self.num_tasks, self.work = what, num_tasks, work
        self._tasks = self._rows = self._left_out = self._tasks_left_out = 0
        self._started = time.monotonic()

    def rows(self, count: int) -> None:
        """`count` more rows are written."""
        self._rows += count
        self._show()

    def task(self, rows: int, was_there: bool) -> None:
        """One more task, of so many rows, is done; nothing of it was written if it was there."""
        self._tasks += 1
        if was_there:
            self._left_out += rows
            self._tasks_left_out += 1
        self._show()

    def text(self) -> str:
        """One line."""
        seconds = time.monotonic() - self._started
        rate = self._rows / seconds if seconds else 0.0
        line = f"{self._what}: {self._tasks}/{self.num_tasks} tasks, {self._rows:,} rows"
        if rate:
            line += f", {rate:,.0f} rows/s"
        left = self._seconds_left(seconds)
        return line + (f", {training_progress.duration(left)} left" if left is not None else "")

    def _seconds_left(self, seconds: float) -> float | None:
        if self.work:
            done, total = self._rows, self.work - self._left_out
        else:
            done = self._tasks - self._tasks_left_out
            total = self.num_tasks - self._tasks_left_out
        return seconds * max(total - done, 0) / done if done else None

    def _show(self) -> None:
        """Shows nothing: see `shown`."""


class _Lines(Progress):
    """A line now and then, for logs."""

    _said = 0.0

    def _show(self) -> None:
        now = time.monotonic()
        if now - max(self._said, self._started) > _SECONDS_BETWEEN_LINES:
            self.say()
            self._said = now

    def say(self) -> None:
        print(self.text(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown(what: str, num_tasks: int, work: int) -> Iterator[Progress]:
    """A progress on standard error: a bar on a terminal, lines elsewhere."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        lines = _Lines(what, num_tasks, work)
        yield lines
        lines.say()
        return
    with rich.progress.Progress(
        rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"), console=console
    ) as bar:
        place = bar.add_task(what, total=num_tasks)
        progress = Progress(what, num_tasks, work)
        progress._show = lambda: bar.update(
            place, completed=progress._tasks, description=progress.text()
        )
        yield progress
