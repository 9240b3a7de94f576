"""One group of runs from its first step to its last: evaluates, selects, stops, saves."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import time
from typing import Any

import jax
from jaxtyping import Int, PyTree
import numpy as np
import optax

from moe_peft import errors
from moe_peft.adaptation import data, programs, scores
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import metrics_writer
from moe_peft.weights import safetensors_files

SELECTIONS = ("validation", "reported_split", "last")
_SAVED = "progress.safetensors"
_SECONDS_A_PIECE = 2.0
_WORST = 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of every run."""

    num_steps: int  # updates of a run
    # Shots of a batch. The incomplete last batch of an epoch is dropped; with fewer shots than
    # that, a batch is all of them.
    batch_size: int
    eval_period: int = 50  # steps between evaluations
    # Which parameters of a run are reported. "validation": those with the best score on the
    # validation examples. "reported_split": those with the best score on the reported split itself,
    # as T0's, T-Few's successors Poly and MHR report (optimistic). "last": the last ones, as T-Few.
    # Of equal scores the lower loss decides, then the earlier step.
    selection: str = "validation"
    # Evaluations without a better one after which a run stops; None for never.
    patience: int | None = None
    save_seconds: float = 60.0  # an evaluation is saved if the last one saved is older

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "eval_period"):
            errors.check_at_least(name, getattr(self, name), 1)
        errors.check_one_of("selection", self.selection, SELECTIONS)
        if self.patience is not None:
            errors.check_at_least("patience", self.patience, 1)
            if self.selection == "last":
                raise errors.UserError(
                    "patience needs evaluations to lose it with; selection='last' makes none."
                )


@dataclasses.dataclass(frozen=True)
class GroupData:
    """What the runs of a group see."""

    jobs: Sequence[data.Job]  # of each
    tables: Mapping[str, np.ndarray]  # feature name to [R, rows, ...], the last row being padding
    # Steps -> Int[R k b], the rows that each step of each run sees.
    schedule: Callable[[range], Int[np.ndarray, "R k b"]]


@dataclasses.dataclass
class RunProgress:
    """Where one run is."""

    steps: int = 0  # updates made
    # "running", "done", "stopped early" or "diverged" (its loss or gradient was not finite: it
    # keeps the parameters before that step).
    state: str = "running"
    best_step: int = 0  # updates made when the kept parameters were
    best_score: float | None = None  # theirs on the split that selects; None before any evaluation
    best_loss: float | None = None  # theirs, which decides between equal scores
    stale: int = 0  # evaluations since they were found
    # One entry an evaluation: step, train_loss, score, loss.
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether it still takes part."""
        return self.state == "running"

    def consider(self, score: float, loss: float) -> bool:
        """Notes an evaluation at the present step; returns whether it is the best so far."""
        is_better = self.best_score is None or (score, -loss) > (self.best_score, -self.best_loss)
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.best_step, self.best_score, self.best_loss = self.steps, score, loss
        return is_better


class GroupRun:
    """Runs of one shape, stacked."""

    def __init__(
        self,
        mapped: programs.MappedRuns,
        optimizer: optax.GradientTransformation,
        group_data: GroupData,
        scorer: scores.Scorer,
        settings: Settings,
        folder: pathlib.Path,
        progress: progress_lib.Runs,
    ):
        """`optimizer` is that of one run; `folder` that of the group, to go on after a kill."""
        self._mapped, self._optimizer, self._data = mapped, optimizer, group_data
        self._scorer, self._settings, self._folder = scorer, settings, folder
        self._progress, self._piece = progress, 1
        self._started = time.monotonic()
        self.seconds_before = 0.0  # that earlier processes spent on what was saved

    def train(self, trainables: Sequence[PyTree]) -> tuple[PyTree, list[RunProgress]]:
        """Trains every run from its `trainables`; returns (kept ones, stacked; where runs are)."""
        jobs, settings = self._data.jobs, self._settings
        seeds = [job.key_seed for job in jobs]
        states = self._mapped.create_states(trainables, self._optimizer, seeds)
        best = self._mapped.to_devices(programs.stack(trainables))
        runs, step = [RunProgress() for _ in jobs], 0
        saved = self._load(states, best)
        if saved:
            states, best, runs, step = saved
        tables = self._mapped.to_devices(self._data.tables)
        with metrics_writer.MetricsWriter(self._folder, step, say=self._progress.say) as writer:
            self._saved = time.monotonic()
            while step < settings.num_steps and any(run.is_running for run in runs):
                states, best, step = self._train_period(states, best, runs, step, tables, writer)
                if time.monotonic() - self._saved >= settings.save_seconds:
                    self._save(states, best, runs, step)
        for run in runs:
            if run.is_running:
                run.state = "done"
            if settings.selection == "last":
                best, run.best_step = states.trainable, run.steps
        self._progress.update(jobs, runs)
        return best, runs

    def _train_period(self, states, best, runs, step, tables, writer):
        """Trains up to the next evaluation and evaluates."""
        settings = self._settings
        count = min(settings.eval_period - step % settings.eval_period, settings.num_steps - step)
        rows = self._data.schedule(range(step, step + settings.eval_period))
        rows = self._mapped.to_devices(rows)
        took_part = [index for index, run in enumerate(runs) if run.is_running]
        states, losses = self._train_steps(states, runs, tables, rows, count)
        step += count
        scored = None
        if settings.selection != "last":
            split = "validation" if settings.selection == "validation" else "test"
            scored = self._scorer(states.trainable, split)
            is_better = np.zeros(len(runs), bool)
            for index in took_part:
                score, loss = _finite(scored[index])
                is_better[index] = runs[index].consider(score, loss)
            best = self._mapped.keep_better(is_better, states.trainable, best)
        for index in took_part:
            run, entry = runs[index], {"step": runs[index].steps, "train_loss": losses[index]}
            if scored is not None:
                entry |= dict(zip(("score", "loss"), _finite(scored[index])))
            run.curve.append(entry)
            if run.is_running and run.stale >= (settings.patience or np.inf):
                run.state = "stopped early"
        writer.write(step, _means([runs[index].curve[-1] for index in took_part]))
        self._progress.update(self._data.jobs, runs)
        return states, best, step

    def _train_steps(self, states, runs, tables, rows, count):
        """Makes `count` steps in pieces short enough to be watched; mean losses of every run."""
        losses, done = np.zeros((len(runs), 0), np.float32), 0
        while done < count:
            active = np.array([run.is_running for run in runs])
            if not np.any(active):
                break
            piece, started = min(self._piece, count - done), time.monotonic()
            states, still, report = self._mapped.advance(states, active, tables, rows, done, piece)
            for index, run in enumerate(runs):
                run.steps += int(report.steps[index])
                if active[index] and not still[index]:
                    run.state = "diverged"
            losses, done = np.concatenate([losses, report.losses], axis=1), done + piece
            self._progress.update(self._data.jobs, runs, [_mean(row) for row in losses])
            seconds = max(time.monotonic() - started, 1e-6)
            self._piece = max(1, min(2 * piece, round(piece * _SECONDS_A_PIECE / seconds)))
        return states, [_mean(row) for row in losses]

    def _save(self, states, best, runs, step) -> None:
        tree = {"states": _numbered(states), "best": _numbered(best)}
        safetensors_files.save_tree(
            self._mapped.to_host(tree, len(runs)),
            self._folder / _SAVED,
            metadata={
                "step": step,
                "seconds": self.seconds_before + time.monotonic() - self._started,
                "jobs": [str(job) for job in self._data.jobs],
                "standings": [dataclasses.asdict(run) for run in runs],  # as version 0.1 wrote it
            },
        )
        self._saved = time.monotonic()

    def _load(self, states, best):
        path = self._folder / _SAVED
        if not path.exists():
            return None
        tree, record = safetensors_files.read_tree(path), safetensors_files.read_metadata(path)
        if record["jobs"] != [str(job) for job in self._data.jobs]:
            raise errors.UserError(f"{path} is of other runs. Choose another MODEL_DIR.")
        self.seconds_before = record["seconds"]
        self._progress.say(f"going on from step {record['step']} of {self._folder.name}")

        def restored(fresh: PyTree, numbered: dict[str, np.ndarray]) -> PyTree:
            found = self._mapped.to_devices([numbered[name] for name in sorted(numbered)])
            return jax.tree.unflatten(jax.tree.structure(fresh), found)

        runs = [RunProgress(**run) for run in record["standings"]]
        trees = (restored(states, tree["states"]), restored(best, tree["best"]))
        return *trees, runs, record["step"]

    def forget_saved(self) -> None:
        """Removes what was saved for going on, once the group's results are on disk."""
        (self._folder / _SAVED).unlink(missing_ok=True)


def _numbered(tree: PyTree) -> dict[str, Any]:
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _finite(scored: scores.Scored) -> tuple[float, float]:
    """(score, loss); what is not a number counts as the worst, and files can hold it."""
    return (
        scored.score if np.isfinite(scored.score) else 0.0,
        scored.loss if np.isfinite(scored.loss) else _WORST,
    )


def _mean(losses: np.ndarray) -> float | None:
    """Mean over the steps that were made, None without any."""
    made = losses[~np.isnan(losses)]
    return float(np.mean(made, dtype=np.float64)) if len(made) else None


def _means(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the runs that took part."""
    names = [name for name in entries[0] if name != "step"]
    found = {name: [e[name] for e in entries if e[name] is not None] for name in names}
    means = {f"mean/{name}": float(np.mean(values)) for name, values in found.items() if values}
    return {"num_runs": float(len(entries)), **means}


def write_adapters(path: pathlib.Path, trainable: PyTree, jobs: Sequence[data.Job]) -> None:
    """Writes stacked leaves [R, ...] as safetensors; the metadata says which run is which."""
    safetensors_files.save_tree(
        trainable, path, metadata={"runs": [dataclasses.asdict(job) for job in jobs]}
    )


def read_adapters(path: pathlib.Path) -> dict[data.Job, PyTree]:
    """The trainable tree of every run in a file that `write_adapters` wrote."""
    tree, metadata = safetensors_files.read_tree(path), safetensors_files.read_metadata(path)
    jobs = [data.Job(**run) for run in metadata["runs"]]
    return {job: programs.unstack(tree, run) for run, job in enumerate(jobs)}
