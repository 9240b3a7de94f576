"""The steps of one process's part of a run, and what happens between them."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import signal
import time

import gin
import jax
from jaxtyping import PyTree
import numpy as np

import moe_peft
from moe_peft import errors
from moe_peft.config import gin_files
from moe_peft.runtime import host_memory, processes
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import boards, checkpoints, metrics_writer
from moe_peft.training import logbook as logbook_lib
from moe_peft.training import step as step_lib
from moe_peft.training.monitors import base
from moe_peft.weights import leaves, saved_run

_AGREEMENT_PERIOD = 10  # steps after which several processes ask each other whether to stop

Batches = Iterator[Mapping[str, np.ndarray]]
EvalHook = Callable[[int, PyTree], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of a run."""

    num_steps: int  # updates in all, earlier ones of the same run included
    batch_size: int  # rows of a batch, over all devices and micro-batches
    seed: int = 0  # of fresh adapters, dropout and the order of the data
    num_microbatches: int = 1  # parts a batch is computed in, to save memory; same result
    frozen_dtype: str = "float32"  # or "bfloat16" for half the memory
    checkpoint_period: int = 1_000  # steps between checkpoints; there is always one at the end
    keep: int = 3  # newest checkpoints that are kept
    log_period: int = 100  # steps between lines of metrics.jsonl
    eval_period: int = 1_000  # steps between evaluations; there is always one at the end
    # Try factors of the learning rate for a few steps each, and train with the best: see
    # `rate_search`. A run that goes on keeps what it took.
    searches_rate: bool = False
    # Where metrics go besides metrics.jsonl: any of "tensorboard", "wandb", "mlflow"; () for none.
    log_to: tuple[str, ...] | str = ("tensorboard",)

    def __post_init__(self):
        for name in ("num_steps", "checkpoint_period", "log_period", "eval_period", "keep"):
            errors.check_at_least(name, getattr(self, name), 1)
        leaves.check_dtype(self.frozen_dtype)
        boards.chosen(self.log_to)

    def num_new_checkpoints(self, num_old: int) -> int:
        """Returns how many more there will be at once; one more than is kept while saving."""
        planned = -(-self.num_steps // self.checkpoint_period)
        return max(min(self.keep, planned) + 1 - num_old, 1)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: step_lib.TrainState  # after the last step
    frozen: PyTree
    # The last line of training metrics in metrics.jsonl; empty if no step was made.
    metrics: Mapping[str, float]


class Run:
    """One process's part of a run, from the restored state to the last step or a signal."""

    def __init__(self, settings, description, train_step, frozen, stop, monitors=()):
        self._settings, self._description = settings, description
        self._train_step, self._frozen = train_step, frozen
        self._stop, self._monitors = stop, monitors

    def make_steps(self, folder, state, saved, batches, warnings=()) -> Result:
        """Makes the steps that are left."""
        settings = self._settings
        first_step = saved.step if saved else 0
        with contextlib.ExitStack() as stack:
            is_first = processes.is_first()
            self._progress = progress_lib.Steps(settings.num_steps, is_silent=not is_first)
            stack.callback(self._progress.close)
            self._progress.update(first_step)
            kind = metrics_writer.MetricsWriter if is_first else metrics_writer.Silent
            what = (settings.log_to, self._description, self._progress.say)
            self._writer = stack.enter_context(kind(folder, first_step, *what))
            base.drop_after(folder, first_step)
            saver = checkpoints.Checkpoints(folder, settings.keep)
            self._checkpoints = stack.enter_context(saver)
            names = step_lib.leaf_names(state.trainable)
            unwritten = saved.record["unwritten_metrics"] if saved else ()
            self._logbook = logbook_lib.Logbook(self._writer, self._progress, names, unwritten)
            if is_first:
                gin_files.write_config(folder)
            for warning in warnings:
                self._progress.say(f"WARNING: {warning}")
            if saved:
                self._progress.say(f"going on from step {first_step} in {folder}")
            try:
                result = self._loop(state, first_step, batches)
                for line in self._writer.close(is_complete=True):
                    self._progress.say(line)
                return result
            except logbook_lib.NonFiniteError as error:
                self._checkpoints.wait()
                kept = saved_run.steps(folder)
                last = f"that of step {kept[-1]}" if kept else "none"
                raise logbook_lib.NonFiniteError(
                    f"{error} The last good checkpoint is {last}, in {folder}."
                ) from None

    def _loop(self, state, first_step, batches) -> Result:
        settings, line, started = self._settings, {}, time.monotonic()
        memory = host_memory.Kept()
        for step in range(first_step + 1, settings.num_steps + 1):
            state, metrics = self._train_step(state, self._frozen, next_batch(batches, step))
            memory.after_step()
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                took = time.monotonic() - started
                self._progress.say(f"compiled and made the first step in {took:.1f} s")
                self._logbook.start(step)
            self._logbook.add(step, metrics)
            is_last = step == settings.num_steps
            if is_last or step % settings.log_period == 0:
                line = self._logbook.write(step)
                self._checkpoints.check()
            for monitor in self._monitors:
                if is_last or step % monitor.period == 0:
                    self._watch(monitor, step, state)
            is_stopping = not is_last and self._is_stopping(step)
            if is_last or is_stopping or step % settings.checkpoint_period == 0:
                self._save(step, state)
            if is_stopping:
                self._exit(step)
        self._checkpoints.wait()
        return Result(state, self._frozen, line)

    def _is_stopping(self, step) -> bool:
        """Whether a signal came, in any process: all have to stop at the same step."""
        is_due = jax.process_count() == 1 or step % _AGREEMENT_PERIOD == 0
        return is_due and processes.anywhere(self._stop.received is not None)

    def _save(self, step, state):
        self._logbook.collect()
        record = {
            "step": step,
            "batches_consumed": step,
            "description": self._description,
            "unwritten_metrics": self._logbook.unwritten,
            "gin_config": gin.config_str(),
            "moe_peft_version": moe_peft.__version__,
        }
        with self._logbook.pause():
            self._checkpoints.save(state, record)

    def _watch(self, monitor, step, state):
        self._logbook.collect()  # A NaN is reported as the step's, not met by the monitor.
        with self._logbook.pause():
            found = monitor.watch(step, self._frozen, state.trainable)
        self._writer.write(step, {f"{monitor.name}/{name}": x for name, x in found.items()})

    def _exit(self, step):
        self._checkpoints.wait()
        received = self._stop.received or signal.SIGTERM  # Another process's, in this one unseen.
        name = received.name
        self._progress.say(f"{name}: saved step {step}; the same command goes on from there.")
        raise SystemExit(128 + received)  # As shells report it.


def next_batch(batches: Batches, step: int) -> Mapping[str, np.ndarray]:
    """Returns the batch of `step`; raises UserError if there is none."""
    try:
        return next(batches)
    except StopIteration:
        raise errors.UserError(
            f"The data ended before step {step}: is the task or mixture empty?"
        ) from None
