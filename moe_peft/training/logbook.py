"""Metrics between the device and the reader: fetched now and then, watched for NaN, averaged."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_peft import errors
from moe_peft.models import losses
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import metrics_writer
from moe_peft.training import step as step_lib

_SECONDS_BETWEEN_REPORTS = 5.0


class NonFiniteError(errors.UserError):
    """A loss or a gradient is NaN or infinite."""


class Logbook:
    """Keeps the metrics of every step on the device until they are wanted.

    Averages are over all steps since the last line, in whatever pieces the run was made: the pieces
    not yet written travel in the checkpoint (`unwritten`).
    """

    def __init__(
        self,
        writer: metrics_writer.MetricsWriter,
        progress: progress_lib.Steps,
        leaf_names: Sequence[str],
        unwritten: Sequence[Mapping[str, float]] = (),
    ):
        self._writer, self._progress, self._leaf_names = writer, progress, leaf_names
        self._on_device: list[tuple[int, Mapping[str, Array]]] = []
        self._on_host = [dict(metrics) for metrics in unwritten]
        self._clock = _Clock()

    @property
    def unwritten(self) -> list[dict[str, float]]:
        """Metrics of the steps since the last line, as numbers; `collect` first.

        A copy: checkpoints are written in the background while the next steps add theirs.
        """
        return list(self._on_host)

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Takes the metrics of a step without waiting for them."""
        self._on_device.append((step, metrics))
        self._progress.update(step)
        if self._clock.is_time_to_report():
            for ready_step, newest in reversed(self._on_device):
                if newest["loss_sum"].is_ready():
                    loss = float(newest["loss_sum"]) / max(float(newest["normalizer"]), 1e-9)
                    self._progress.report(ready_step, loss, self._clock.rate(ready_step))
                    break

    def collect(self) -> None:
        """Waits for all metrics so far; NonFiniteError: a loss or a gradient was not finite."""
        fetched = jax.device_get(self._on_device)
        self._on_device = []
        for step, metrics in fetched:
            numbers = {name: value.item() for name, value in metrics.items()}
            self._check_finite(step, numbers)
            self._on_host.append(numbers)

    def write(self, step: int) -> dict[str, float]:
        """Writes one line over the steps since the last one and returns it."""
        self.collect()
        line = summarize(self._on_host)
        self._on_host = []
        self._writer.write(step, line)
        rate = self._clock.rate(step)
        self._writer.write_to_boards(step, {"steps_per_second": rate})
        self._progress.report(step, line["loss"], rate)
        return line

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context in which time does not count as training, such as evaluation."""
        entered = time.monotonic()
        try:
            yield
        finally:
            self._clock.skip(time.monotonic() - entered)

    def start(self, step: int) -> None:
        """Starts the clock: what came before, such as compiling, is not training."""
        self._clock.start(step)

    def _check_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        index = int(numbers["bad_leaf"])
        if index == step_lib.ALL_FINITE:
            return
        loss = numbers["loss_sum"] / max(numbers["normalizer"], 1e-9)
        where = "the loss itself"
        if index != step_lib.LOSS_IS_BAD:
            where = f"the gradient of {self._leaf_names[index]}"
        raise NonFiniteError(
            f"Step {step}: {where} is not finite (loss {loss}). Training stops here; a lower "
            "learning rate, clip_norm or DTYPE='float32' may help."
        )


def summarize(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns one line for several steps: sums are added first and divided once.

    Counts are totals over the steps, `grad_norm` is a mean, `param_norm` and learning rates are
    those of the last step.
    """

    total = lambda name: sum(metrics[name] for metrics in steps)
    last = steps[-1]
    names = [name for name in last if name.startswith("sums/")]
    sums = {name.removeprefix("sums/"): jnp.float32(total(name)) for name in names}
    normalizer = total("normalizer")
    line = {
        "loss": total("loss_sum") / max(normalizer, 1e-9),
        "examples": total("examples"),
        "grad_norm": total("grad_norm") / len(steps),
        "param_norm": last["param_norm"],
        **{name: value for name, value in last.items() if name.startswith("learning_rate")},
        **losses.summarize(sums, normalizer),
    }
    return {name: float(value) for name, value in line.items()}


class _Clock:
    """Steps per second, without the time that is not training."""

    def __init__(self):
        self._start = self._reported = time.monotonic()
        self._first_step = None

    def start(self, step: int) -> None:
        self._first_step, self._start = step, time.monotonic()

    def skip(self, seconds: float) -> None:
        self._start += seconds

    def is_time_to_report(self) -> bool:
        return time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS

    def rate(self, step: int) -> float:
        """Steps per second since the last call, or 0 before anything was measured."""
        now = time.monotonic()
        self._reported = now
        if self._first_step is None or step <= self._first_step:
            return 0.0
        rate = (step - self._first_step) / max(now - self._start, 1e-9)
        self._first_step, self._start = step, now
        return rate
