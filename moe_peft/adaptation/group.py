"""One group of a fleet from its first step to its last: evaluates, selects, stops, saves."""

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
from moe_peft.adaptation import data, programs
from moe_peft.adaptation import scores as scores_lib
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import metrics_writer
from moe_peft.weights import backbone

SELECTIONS = ("validation", "reported_split", "last")
_PROGRESS = "progress.safetensors"
_SECONDS_A_PIECE = 2.0
_WORST = 1e30

# (stacked trainables on the devices, "validation" or "test") -> one result a run.
Scorer = Callable[[PyTree, str], Sequence[scores_lib.Scored]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of every run of a fleet; see `adapt.adapt`."""

    num_steps: int
    batch_size: int
    eval_period: int
    selection: str = "validation"
    patience: int | None = None
    save_seconds: float = 60.0

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "eval_period"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.selection not in SELECTIONS:
            raise errors.UserError(
                f"selection is {self.selection!r}, expected one of {', '.join(SELECTIONS)}."
                + errors.near(str(self.selection), SELECTIONS)
            )
        if self.patience is not None and self.patience < 1:
            raise errors.UserError(f"patience must be at least 1, got {self.patience}.")
        if self.patience is not None and self.selection == "last":
            raise errors.UserError(
                "patience needs evaluations to lose it with; selection='last' makes none."
            )


@dataclasses.dataclass(frozen=True)
class Runs:
    """What the runs of a group are and see.

    Attributes:
      jobs: of each.
      tables: feature name to [R, rows, ...], the last row being padding.
      schedule: steps -> Int[R k b], the rows that each step of each run sees.
    """

    jobs: Sequence[data.Job]
    tables: Mapping[str, np.ndarray]
    schedule: Callable[[range], Int[np.ndarray, "R k b"]]


@dataclasses.dataclass
class Standing:
    """Where one run is.

    Attributes:
      steps: updates made.
      state: "running", "done", "stopped early" or "diverged" (its loss or gradient was not finite:
        it keeps the parameters before that step).
      best_step: updates made when the kept parameters were.
      best_score: theirs on the split that selects; None before any evaluation.
      best_loss: likewise; decides between equal scores.
      stale: evaluations since they were found.
      curve: one entry an evaluation: step, train_loss, score, loss.
    """

    steps: int = 0
    state: str = "running"
    best_step: int = 0
    best_score: float | None = None
    best_loss: float | None = None
    stale: int = 0
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
    """Runs of one shape, stacked.

    Attributes:
      seconds_before: that earlier processes spent on what was saved.
    """

    def __init__(
        self,
        fleet: programs.Fleet,
        optimizer: optax.GradientTransformation,
        runs: Runs,
        scorer: Scorer,
        settings: Settings,
        folder: pathlib.Path,
        progress: progress_lib.Runs,
    ):
        """Nothing runs yet.

        Args:
          fleet: compiled programs.
          optimizer: of one run.
          runs: what they are and see.
          scorer: evaluates all runs.
          settings: numbers.
          folder: of this group, for the metrics and for going on after a kill.
          progress: shows every run.
        """
        self._fleet, self._optimizer, self._runs = fleet, optimizer, runs
        self._scorer, self._settings, self._folder = scorer, settings, folder
        self._progress, self._piece = progress, 1
        self._started, self.seconds_before = time.monotonic(), 0.0

    def go(self, trainables: Sequence[PyTree]) -> tuple[PyTree, list[Standing]]:
        """Trains until every run has ended; returns (kept trainables, stacked; their standings).

        Args:
          trainables: initial leaves of every run.
        """
        seeds = [job.key_seed for job in self._jobs]
        states = self._fleet.create(trainables, self._optimizer, seeds)
        best = self._fleet.put(programs.stack(trainables))
        standings, step = [Standing() for _ in self._jobs], 0
        saved = self._load(states, best)
        if saved:
            states, best, standings, step = saved
        tables = self._fleet.put(self._runs.tables)
        with metrics_writer.MetricsWriter(self._folder, step) as writer:
            self._saved = time.monotonic()
            while step < self._settings.num_steps and any(one.is_running for one in standings):
                states, best, step = self._period(states, best, standings, step, tables, writer)
                if time.monotonic() - self._saved >= self._settings.save_seconds:
                    self._save(states, best, standings, step)
        if self._settings.selection == "last":
            best = states.trainable
        for standing in standings:
            if standing.is_running:
                standing.state = "done"
            if self._settings.selection == "last":
                standing.best_step = standing.steps
        self._progress.update(self._jobs, standings)
        return best, standings

    @property
    def _jobs(self):
        return self._runs.jobs

    def _period(self, states, best, standings, step, tables, writer):
        """Trains up to the next evaluation and evaluates."""
        settings = self._settings
        count = min(settings.eval_period - step % settings.eval_period, settings.num_steps - step)
        rows = self._runs.schedule(range(step, step + settings.eval_period))
        took_part = np.array([standing.is_running for standing in standings])
        states, found = self._train(states, standings, tables, self._fleet.put(rows), count)
        step += count
        scores = None
        if settings.selection != "last":
            split = "validation" if settings.selection == "validation" else "test"
            scores = self._scorer(states.trainable, split)
            is_better = np.zeros(len(standings), bool)
            for run in np.flatnonzero(took_part):
                score, loss = scores[run].score, scores[run].loss
                is_better[run] = standings[run].consider(_finite(score, 0.0), _finite(loss, _WORST))
            best = self._fleet.keep_better(is_better, states.trainable, best)
        for run in np.flatnonzero(took_part):
            self._note(standings[run], found[run], scores[run] if scores else None)
        writer.write(step, _means([standings[run].curve[-1] for run in np.flatnonzero(took_part)]))
        self._progress.update(self._jobs, standings)
        return states, best, step

    def _train(self, states, standings, tables, rows, count):
        """Makes `count` steps in pieces short enough to be watched; mean losses of every run."""
        losses, done = np.zeros((len(standings), 0), np.float32), 0
        while done < count:
            active = np.array([standing.is_running for standing in standings])
            if not np.any(active):
                break
            piece, started = min(self._piece, count - done), time.monotonic()
            states, still, advanced = self._fleet.advance(states, active, tables, rows, done, piece)
            for standing, steps, was, still_is in zip(
                standings, advanced.steps, active, still, strict=True
            ):
                standing.steps += int(steps)
                if was and not still_is:
                    standing.state = "diverged"
            losses, done = np.concatenate([losses, advanced.losses], axis=1), done + piece
            self._progress.update(self._jobs, standings, [_mean(row) for row in losses])
            seconds = max(time.monotonic() - started, 1e-6)
            self._piece = max(1, min(2 * piece, round(piece * _SECONDS_A_PIECE / seconds)))
        return states, [_mean(row) for row in losses]

    def _note(self, standing, train_loss, scored):
        entry = {"step": standing.steps, "train_loss": train_loss}
        if scored is not None:
            entry |= {"score": _finite(scored.score, 0.0), "loss": _finite(scored.loss, _WORST)}
        standing.curve.append(entry)
        patience = self._settings.patience
        if standing.is_running and patience is not None and standing.stale >= patience:
            standing.state = "stopped early"

    def _save(self, states, best, standings, step) -> None:
        count = len(standings)
        tree = {"states": _numbered(states), "best": _numbered(best)}
        backbone.save(
            self._fleet.get(tree, count),
            self._folder / _PROGRESS,
            metadata={
                "step": step,
                "seconds": self.seconds_before + time.monotonic() - self._started,
                "jobs": [str(job) for job in self._jobs],
                "standings": [dataclasses.asdict(standing) for standing in standings],
            },
        )
        self._saved = time.monotonic()

    def _load(self, states, best):
        path = self._folder / _PROGRESS
        if not path.exists():
            return None
        tree, record = backbone.read(path), backbone.read_metadata(path)
        if record["jobs"] != [str(job) for job in self._jobs]:
            raise errors.UserError(f"{path} is of other runs. Choose another MODEL_DIR.")
        self.seconds_before = record["seconds"]
        standings = [Standing(**standing) for standing in record["standings"]]
        self._progress.say(f"going on from step {record['step']} of {self._folder.name}")
        return (
            self._restored(states, tree["states"]),
            self._restored(best, tree["best"]),
            standings,
            record["step"],
        )

    def _restored(self, fresh: PyTree, numbered: dict[str, np.ndarray]) -> PyTree:
        leaves, structure = jax.tree.flatten(fresh)
        found = [numbered[f"{i:05}"] for i in range(len(leaves))]
        return jax.tree.unflatten(structure, self._fleet.put(found))

    def forget(self) -> None:
        """Removes what was saved for going on, once the group's results are on disk."""
        (self._folder / _PROGRESS).unlink(missing_ok=True)


def _numbered(tree: PyTree) -> dict[str, Any]:
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _finite(value: float, worst: float) -> float:
    """The value; what is not a number counts as the worst, and files can hold it."""
    return value if np.isfinite(value) else worst


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


def write_adapters(
    path: pathlib.Path, trainable: PyTree, jobs: Sequence[data.Job], metadata: dict[str, Any]
) -> None:
    """Writes stacked leaves [R, ...] as safetensors; the metadata says which run is which."""
    runs = [dataclasses.asdict(job) for job in jobs]
    backbone.save(trainable, path, metadata={**metadata, "runs": runs})


def read_adapters(path: pathlib.Path) -> dict[data.Job, PyTree]:
    """The trainable tree of every run in a file that `write_adapters` wrote."""
    tree, metadata = backbone.read(path), backbone.read_metadata(path)
    jobs = [data.Job(**run) for run in metadata["runs"]]
    return {job: programs.unstack(tree, run) for run, job in enumerate(jobs)}
