"""How far a long command is: drawn in place on a terminal, a line now and then elsewhere."""

from collections.abc import Sequence
import sys
import time
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

_SECONDS_BETWEEN_DRAWINGS = 0.1


class Progress:
    """Counts what is done; this one shows nothing."""

    def advance(self, count: int) -> None:
        """`count` more are done."""


class _Display:
    """What all displays share: a place on standard error.

    As a context manager it ends with the state as the last line, unless there was an error.
    """

    _seconds_between_lines = 10.0

    def __init__(
        self, total: int, is_silent: bool = False, console: rich.console.Console | None = None
    ):
        """Takes the place; of several processes, all but one are silent."""
        console = console or rich.console.Console(stderr=True)
        self._done, self._total = 0, total
        self._is_silent, self._live = is_silent, None
        if console.is_terminal and not is_silent:
            self._live = rich.live.Live(console=console, auto_refresh=False)
            self._live.start()
        self._started = self._shown = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None and self._live is None:
            self.say(self.text())
        self.close()

    def say(self, text: str) -> None:
        """Prints one line, on a terminal above what is drawn."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif not self._is_silent:
            self._shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the last state on a terminal."""
        if self._live is not None:
            self._show(is_due=True)
            self._live.stop()

    def text(self) -> str:
        """Returns the state as one line."""
        raise NotImplementedError

    def _picture(self) -> rich.console.RenderableType:
        grid = rich.table.Table.grid(padding=(0, 1))
        bar = rich.progress_bar.ProgressBar(max(self._total, 1), self._done, width=30)
        grid.add_row(bar, rich.text.Text(self.text()))
        return grid

    def _show(self, is_due: bool = False) -> None:
        """Draws or prints the state, unless that was done a moment ago; always if it is due."""
        age = time.monotonic() - self._shown
        if self._live is None:
            if is_due or age > self._seconds_between_lines:
                self.say(self.text())
        elif is_due or age > _SECONDS_BETWEEN_DRAWINGS:
            self._shown = time.monotonic()
            self._live.update(self._picture(), refresh=True)


class Steps(_Display):
    """A training run: step, loss, rate and time left. A log gets one line a report."""

    _loss, _rate = None, 0.0

    def update(self, step: int) -> None:
        """To be called at every step; cheap, and does not wait for the device."""
        self._done = step
        if self._live is not None:
            self._show()

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """To be called whenever metrics have arrived; the rate is 0 while it is unknown."""
        self._done, self._loss = step, loss
        if steps_per_second or self._live is None:  # A terminal goes on showing the last rate.
            self._rate = steps_per_second
        self._show(is_due=True)

    def text(self) -> str:
        """Step, loss, steps per second and time left, as far as they are known."""
        line = f"step {self._done}/{self._total}"
        if self._loss is not None:
            line += f"  loss {self._loss:.4f}"
        if self._rate:
            left = duration((self._total - self._done) / self._rate)
            line += f"  {self._rate:.2f} steps/s  {left} left"
        return line


class _Counter(_Display, Progress):
    def __init__(self, what: str, total: int, **kwargs: Any):
        super().__init__(total, **kwargs)
        self._what = what

    def advance(self, count: int) -> None:
        self._done += count
        self._show()

    def text(self) -> str:
        line, seconds = f"{self._what}: {self._done}/{self._total}", self._seconds()
        if self._done >= self._total:
            return f"{line} in {seconds:.1f} s"
        if not (self._done and seconds):
            return line
        left = duration(seconds * (self._total - self._done) / self._done)
        return f"{line}, {self._done / seconds:.0f}/s, {left} left"

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def shown(what: str, total: int) -> _Counter:
    """Returns a context manager that is a `Progress` of `total` examples, questions or files."""
    return _Counter(what, total)


class Rows(_Counter):
    """Tasks and the rows that are written for them; what was there already costs no time."""

    def __init__(self, what: str, num_tasks: int, num_rows: int, **kwargs: Any):
        """`num_rows` are expected in all; 0 where nobody knows, then tasks are counted."""
        super().__init__(what, num_tasks, **kwargs)
        self._num_rows = num_rows
        self._rows = self._rows_left_out = self._tasks_left_out = 0

    def rows(self, count: int) -> None:
        """`count` more rows are written."""
        self._rows += count
        self._show()

    def task(self, rows: int, was_there: bool) -> None:
        """One more task, of so many rows, is done; nothing of it was written if it was there."""
        if was_there:
            self._rows_left_out += rows
            self._tasks_left_out += 1
        self.advance(1)

    def text(self) -> str:
        """Tasks, rows, rows per second and time left."""
        seconds = self._seconds()
        line = f"{self._what}: {self._done}/{self._total} tasks, {self._rows:,} rows"
        if self._rows and seconds:
            line += f", {self._rows / seconds:,.0f} rows/s"
        if self._num_rows:
            done, total = self._rows, self._num_rows - self._rows_left_out
        else:
            done, total = (x - self._tasks_left_out for x in (self._done, self._total))
        return line + (f", {duration(seconds * max(total - done, 0) / done)} left" if done else "")


class Runs(_Display):
    """Many runs at once: a table, or in a log one line a run after every evaluation.

    Runs of earlier groups stay in the table.
    """

    _seconds_between_lines = 20.0

    def __init__(self, num_steps: int, num_runs: int, **kwargs: Any):
        super().__init__(num_runs, **kwargs)
        self._num_steps, self._summary = num_steps, ""
        self._rows: dict[Any, list[str]] = {}
        self._said: dict[Any, tuple[int, str]] = {}

    def update(self, jobs: Sequence[Any], runs: Sequence[Any], losses: Any = None) -> None:
        """To be called every few seconds and after every evaluation.

        Jobs have `task` and `seed`; where runs are, see `adaptation.group.RunProgress`. `losses`
        are those of training; None for the last ones of the curves.
        """
        for job, run, loss in zip(jobs, runs, losses or [None] * len(jobs), strict=True):
            self._rows[job] = self._row(job, run, loss)
            mark = (len(run.curve), run.state)
            if self._live is None and run.curve and self._said.get(job) != mark:
                self._said[job] = mark
                task, seed, step, loss, best, state = self._rows[job]
                score = f"  best {best}" if best else ""
                self.say(f"{task}  seed {seed}  step {step}  loss {loss}{score}  {state}")
        steps = [run.steps for run in runs if run.is_running]
        step, running = max(steps, default=0), f"{len(steps)} of {len(jobs)} runs running"
        self._summary = f"step {step}/{self._num_steps}  {running}"
        self._show(is_due=self._live is not None)

    def text(self) -> str:
        """The step of the group that trains, and how many of its runs do."""
        return self._summary

    def _row(self, job: Any, run: Any, loss: float | None) -> list[str]:
        if loss is None and run.curve:
            loss = run.curve[-1]["train_loss"]
        return [
            job.task,
            str(job.seed),
            f"{run.steps}/{self._num_steps}",
            "" if loss is None else f"{loss:.4f}",
            "" if run.best_score is None else f"{100 * run.best_score:.1f}",
            run.state,
        ]

    def _picture(self) -> rich.console.RenderableType:
        """Running runs come first, as many as the terminal is high."""
        order = sorted(self._rows.values(), key=lambda cells: cells[-1] != "running")
        ended = sum(cells[-1] != "running" for cells in order)
        title = f"{ended} of {self._total} runs ended"
        table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
        for column in ("task", "seed", "step", "loss", "best score", "state"):
            table.add_column(column, justify="left" if column in ("task", "state") else "right")
        room = max(self._live.console.height - 8, 5)
        for cells in order[:room]:
            table.add_row(*cells)
        if len(order) > room:
            table.add_row(f"and {len(order) - room} more", *[""] * 5)
        return table


def duration(seconds: float) -> str:
    """Returns "1:02:03" or "2:03".

    >>> duration(3723), duration(123)
    ('1:02:03', '2:03')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
