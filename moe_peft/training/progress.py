"""What a person sees while training: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol

import rich.console
import rich.progress


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, step: int) -> None:
        """Called at every step; must be cheap and must not wait for the device."""
        ...

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """Called whenever metrics have arrived; the rate is 0 while it is unknown."""
        ...

    def say(self, text: str) -> None:
        """Prints one line."""
        ...

    def close(self) -> None:
        """Leaves the terminal clean."""
        ...


def make(first_step: int, num_steps: int, is_silent: bool = False) -> Progress:
    """Returns a bar where standard error is a terminal, plain lines otherwise."""
    if is_silent:
        return Silent()
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        return Bar(first_step, num_steps, console)
    return Lines(num_steps)


class Silent:
    """Says nothing: another process does."""

    def update(self, step: int) -> None:
        """Nothing."""

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """One line per report, for logs and pipes."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps

    def update(self, step: int) -> None:
        """Prints nothing: a log wants one line per report."""

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """Prints step, loss, rate and time left."""
        line = f"step {step}/{self._num_steps}  loss {loss:.4f}"
        if steps_per_second:
            left = duration((self._num_steps - step) / steps_per_second)
            line += f"  {steps_per_second:.2f} steps/s  {left} left"
        self.say(line)

    def say(self, text: str) -> None:
        """Prints one line to standard error."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to clean."""


class Bar:
    """A rich progress bar with step, rate, time left and loss."""

    def __init__(self, first_step: int, num_steps: int, console: rich.console.Console):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            rich.progress.TextColumn("{task.fields[left]} left"),
            rich.progress.TextColumn("loss {task.fields[loss]}"),
            console=console,
        )
        self._num_steps = num_steps
        self._task = self._bar.add_task(
            "training", completed=first_step, total=num_steps, rate="?/s", left="?", loss="?"
        )
        self._bar.start()
        self._shown = 0.0

    def update(self, step: int) -> None:
        """Moves the bar at most ten times a second."""
        now = time.monotonic()
        if now - self._shown > 0.1:
            self._shown = now
            self._bar.update(self._task, completed=step)

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """Updates rate, time left and loss."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")
        if steps_per_second:
            left = duration((self._num_steps - step) / steps_per_second)
            self._bar.update(self._task, rate=f"{steps_per_second:.2f}/s", left=left)

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stops the bar and leaves it where it is."""
        self._bar.stop()


def duration(seconds: float) -> str:
    """Returns "1:02:03" or "2:03".

    >>> duration(3723), duration(123)
    ('1:02:03', '2:03')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
