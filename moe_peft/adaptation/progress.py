"""Every run of a fleet as one line: a table on a terminal, plain lines in a log."""

from collections.abc import Sequence
import sys
import time
from typing import Any, Protocol

import rich.box
import rich.console
import rich.live
import rich.table

_SECONDS_BETWEEN_LINES = 20.0


class Progress(Protocol):
    """Shows where every run is."""

    def update(self, jobs: Sequence[Any], standings: Sequence[Any], losses: Any = None) -> None:
        """Called every few seconds and after every evaluation."""
        ...

    def say(self, text: str) -> None:
        """Prints one line."""
        ...

    def close(self) -> None:
        """Leaves the terminal clean."""
        ...


def make(num_steps: int, num_runs: int) -> Progress:
    """Returns a table where standard error is a terminal, plain lines otherwise."""
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        return Table(num_steps, num_runs, console)
    return Lines(num_steps, num_runs)


def row(job: Any, standing: Any, loss: float | None, num_steps: int) -> list[str]:
    """task, seed, step, training loss, best score, state."""
    if loss is None and standing.curve:
        loss = standing.curve[-1]["train_loss"]
    return [
        job.task,
        str(job.seed),
        f"{standing.steps}/{num_steps}",
        "" if loss is None else f"{loss:.4f}",
        "" if standing.best_score is None else f"{100 * standing.best_score:.1f}",
        standing.state,
    ]


class Lines:
    """After every evaluation one line a run, for logs and pipes; in between one line for all."""

    def __init__(self, num_steps: int, num_runs: int):
        self._num_steps, self._num_runs = num_steps, num_runs
        self._seen: dict[Any, int] = {}
        self._said = time.monotonic()

    def update(self, jobs, standings, losses=None) -> None:
        """Prints the runs that were evaluated since, or now and then a summary."""
        losses = losses or [None] * len(jobs)
        for job, standing, loss in zip(jobs, standings, losses, strict=True):
            mark = (len(standing.curve), standing.state)
            if standing.curve and self._seen.get(job) != mark:
                self._seen[job] = mark
                task, seed, step, loss, best, state = row(job, standing, loss, self._num_steps)
                score = f"  best {best}" if best else ""
                self.say(f"{task}  seed {seed}  step {step}  loss {loss}{score}  {state}")
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            running = [standing for standing in standings if standing.is_running]
            step = max((standing.steps for standing in running), default=0)
            self.say(f"step {step}/{self._num_steps}  {len(running)} of {len(jobs)} runs running")

    def say(self, text: str) -> None:
        """Prints one line to standard error."""
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to clean."""


class Table:
    """A live table; runs of earlier groups stay in it."""

    def __init__(self, num_steps: int, num_runs: int, console: rich.console.Console):
        self._num_steps, self._num_runs = num_steps, num_runs
        self._rows: dict[Any, list[str]] = {}
        self._live = rich.live.Live(console=console, auto_refresh=False)
        self._live.start()

    def update(self, jobs, standings, losses=None) -> None:
        """Redraws; running runs come first, as many as the terminal is high."""
        losses = losses or [None] * len(jobs)
        for job, standing, loss in zip(jobs, standings, losses, strict=True):
            self._rows[job] = row(job, standing, loss, self._num_steps)
        self._live.update(self._table(), refresh=True)

    def _table(self) -> rich.table.Table:
        ended = sum(cells[-1] != "running" for cells in self._rows.values())
        table = rich.table.Table(
            title=f"{ended} of {self._num_runs} runs ended", box=rich.box.SIMPLE_HEAD
        )
        for column in ("task", "seed", "step", "loss", "best score", "state"):
            table.add_column(column, justify="left" if column in ("task", "state") else "right")
        room = max(self._live.console.height - 8, 5)
        order = sorted(self._rows.values(), key=lambda cells: cells[-1] != "running")
        for cells in order[:room]:
            table.add_row(*cells)
        if len(order) > room:
            table.add_row(f"and {len(order) - room} more", *[""] * 5)
        return table

    def say(self, text: str) -> None:
        """Prints one line above the table."""
        self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stops the table and leaves it where it is."""
        self._live.stop()
