"""All runs of a fleet: which train together, one group after another, each kept once finished."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np
import optax

from moe_peft import errors, patching
from moe_peft.adaptation import answers, initial, programs, scores
from moe_peft.adaptation import data as data_lib
from moe_peft.adaptation import group as group_lib
from moe_peft.models import encoder_decoder, few_shot
from moe_peft.runtime import json_files
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import step as step_lib
from moe_peft.weights import identity

FOLDER = "groups"
ADAPTERS = "adapters.safetensors"
_PLAN = "plan.json"
_FINISHED = "finished.json"
_PREDICTIONS = "predictions.jsonl"
_PARTS = ("method", "backbone", "source", "optimizer", "loss", "data", "training", "evaluation")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A group whose results are on disk.

    Attributes:
      folder: of the group.
      seconds: it took, compiling included.
      runs: json of each run: task, seed, state, steps, chosen_step, score, curve.
    """

    folder: pathlib.Path
    seconds: float
    runs: Sequence[Mapping[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every prediction of the group's runs."""
        return json_files.read_jsonl(self.folder / _PREDICTIONS)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Trains and evaluates all jobs, group by group.

    Attributes:
      network: with adapters.
      few_shot_loss: weights of the losses.
      start: frozen tree and initial leaves.
      make_optimizer: trainable tree -> optimiser of one run.
      settings: numbers.
      evaluation: how runs are scored.
      folder: of the adaptation.
      mesh: devices.
      progress: shows every run.
    """

    network: encoder_decoder.EncoderDecoder
    few_shot_loss: few_shot.FewShotLoss
    start: initial.Start
    make_optimizer: Callable[[PyTree], optax.GradientTransformation]
    settings: group_lib.Settings
    evaluation: answers.Evaluation
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    progress: progress_lib.Runs

    def run(
        self,
        data: Sequence[data_lib.JobData],
        description: Mapping[str, Any],
        group_size: int | None,
    ) -> list[Finished]:
        """Runs what is not finished yet; returns all.

        Args:
          data: of all jobs.
          description: of the adaptation; one that goes on must have the same.
          group_size: runs of a group at most; None takes as many as fit the memory.
        """
        by_job = {one.job: one for one in data}
        by_key = _by_key(data)
        fleets: dict[Any, programs.Fleet] = {}
        plan = self._read_plan(description)
        if plan is None:
            plan = self._plan(by_key, group_size, fleets)
            record = {"description": description, "groups": [_as_json(group) for group in plan]}
            json_files.write_json(self.folder / FOLDER / _PLAN, record)
        found = []
        for number, jobs in enumerate(plan):
            folder = self.folder / FOLDER / f"{number:03}"
            members = [by_job[job] for job in jobs]
            if not (folder / _FINISHED).exists():
                key = _key(members[0])
                if key not in fleets:
                    same = [len(group) for group in plan if _key(by_job[group[0]]) == key]
                    fleets[key] = self._fleet(members[0], max(same))
                self._run_group(folder, members, fleets[key], _num_rows(by_key[key]))
            record = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
            found.append(Finished(folder, record["seconds"], record["runs"]))
        return found

    def _read_plan(self, description) -> list[list[data_lib.Job]] | None:
        path = self.folder / FOLDER / _PLAN
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        for part in _PARTS:
            difference = identity.first_difference(
                record["description"][part], description[part], part
            )
            if difference:
                raise errors.UserError(
                    f"{self.folder} holds an adaptation with other settings: {difference}. Choose "
                    "another MODEL_DIR, or go back to those settings."
                )
        return [[data_lib.Job(**job) for job in group] for group in record["groups"]]

    def _plan(self, by_key, group_size, fleets) -> list[list[data_lib.Job]]:
        """Groups of jobs of one shape each; `fleets` gets what was compiled to find out."""
        plan = []
        for key, members in by_key.items():
            largest = group_size
            if largest is None:
                fleets[key], largest = self._largest_fleet(members)
            jobs = [one.job for one in members]
            for size in programs.group_sizes(len(jobs), largest):
                plan.append(jobs[:size])
                jobs = jobs[size:]
        return plan

    def _largest_fleet(self, members) -> tuple[programs.Fleet, int]:
        """The fleet of as many runs as fit, compiled, and their number."""
        size = len(members)
        shared = step_lib.num_bytes(self.start.frozen)
        available = programs.device_memory()
        while True:
            fleet = self._fleet(members[0], size)
            started = time.monotonic()
            needed = fleet.compile(*self._abstract(fleet, members)).peak
            self.progress.say(
                f"compiled {size} runs at once in {time.monotonic() - started:.1f} s: they need "
                f"{needed / 1e9:.2f} GB of {available / 1e9:.1f}"
            )
            if needed <= available:
                return fleet, size
            fits = programs.largest_group(size, needed, shared, available)
            if fits < 1 or size == 1:
                raise errors.UserError(
                    f"One run needs more memory than there is: {needed / size / 1e9:.1f} GB of "
                    f"{available / 1e9:.1f} GB. Use smaller batches, or frozen_dtype='bfloat16'."
                )
            size = max(programs.group_sizes(size, min(fits, size - 1)))

    def _abstract(self, fleet, members):
        """Shapes of the arguments of `advance` for the largest group."""
        (trainable,) = self.start.trainables([members[0].job])
        optimizer = self.make_optimizer(trainable)
        one_state = jax.eval_shape(
            lambda tree: step_lib.create_state(tree, optimizer, 0), trainable
        )
        table = data_lib.tables(members[:1], _num_rows(members))
        rows = np.zeros((1, self.settings.eval_period, self.settings.batch_size), np.int32)
        stacked = lambda leaf: fleet.abstract(leaf.shape, leaf.dtype)
        of_one = lambda leaf: fleet.abstract(leaf.shape[1:], leaf.dtype)
        return (
            jax.tree.map(stacked, one_state),
            jax.tree.map(of_one, table),
            of_one(rows),
        )

    def _fleet(self, one: data_lib.JobData, width: int) -> programs.Fleet:
        model = few_shot.FewShotModel(
            self.network, self.few_shot_loss, max(one.shape.num_choices, 1)
        )
        (trainable,) = self.start.trainables([one.job])
        update = step_lib.make_update(model, self.make_optimizer(trainable), patching.merge)
        score = scores.score_rows(
            self.network, one.eval_shape.num_choices, self.evaluation.is_length_normalized
        )
        return programs.Fleet(update, score, self.start.frozen, width, self.mesh)

    def _run_group(self, folder, members, fleet, num_rows) -> None:
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        scorer = self._scorer(fleet, members, folder)
        trainables = self.start.trainables([one.job for one in members])
        group = group_lib.GroupRun(
            fleet,
            self.make_optimizer(trainables[0]),
            group_lib.Runs(
                [one.job for one in members],
                data_lib.tables(members, num_rows),
                lambda steps: np.stack(
                    [one.schedule(self.settings.batch_size, steps) for one in members]
                ),
            ),
            scorer,
            self.settings,
            folder,
            self.progress,
        )
        best, standings = group.go(trainables)
        found = scorer(best, "test")
        rows, runs = [], []
        for one, standing, scored in zip(members, standings, found, strict=True):
            rows += _rows(one, scored)
            runs.append(
                {
                    **dataclasses.asdict(one.job),
                    "state": standing.state,
                    "steps": standing.steps,
                    "chosen_step": standing.best_step,
                    "selection_score": standing.best_score,
                    "score": scored.score,
                    "num_shots": one.num_shots,
                    "num_test_examples": len(one.test),
                    "curve": standing.curve,
                }
            )
        jobs = [one.job for one in members]
        group_lib.write_adapters(folder / ADAPTERS, fleet.get(best, len(jobs)), jobs, {})
        json_files.write_jsonl(folder / _PREDICTIONS, rows)
        seconds = round(group.seconds_before + time.monotonic() - started, 1)
        json_files.write_json(folder / _FINISHED, {"seconds": seconds, "runs": runs})
        group.forget()
        answers.forget(folder)

    def _scorer(self, fleet, members, folder) -> group_lib.Scorer:
        shape, size = members[0].eval_shape, self.evaluation.batch_size
        kept = {"validation": list(data_lib.chunks([m.validation for m in members], shape, size))}
        if self.evaluation.decoding is not None and not shape.num_choices:
            return answers.scorer(self.evaluation, self.network, fleet, members, folder, self.mesh)

        def score(trainables, split):
            parts = [getattr(one, split) for one in members]
            chunks = kept.get(split) or data_lib.chunks(parts, shape, size)
            rows = fleet.score(trainables, chunks, len(members))
            return [
                scores.of_run(
                    tuple(values[run] for values in rows),
                    part.is_cut,
                    [example.answer_choices for example in part.examples],
                )
                for run, part in enumerate(parts)
            ]

        return score


def _key(one: data_lib.JobData) -> tuple[data_lib.Shape, data_lib.Shape]:
    return one.shape, one.eval_shape


def _by_key(data: Sequence[data_lib.JobData]) -> dict[Any, list[data_lib.JobData]]:
    found: dict[Any, list[data_lib.JobData]] = {}
    for one in data:
        found.setdefault(_key(one), []).append(one)
    return found


def _num_rows(members: Sequence[data_lib.JobData]) -> int:
    """Rows of every table, so that one program serves all groups of a shape."""
    return max(len(one.shots) for one in members)


def _as_json(jobs: Sequence[data_lib.Job]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(job) for job in jobs]


def _rows(one: data_lib.JobData, scored: scores.Scored) -> Iterator[dict[str, Any]]:
    for index, example in enumerate(one.test.examples):
        yield {
            **dataclasses.asdict(one.job),
            "template": example.template_id,
            "index": index,
            "inputs": example.inputs,
            "targets": example.targets,
            **({"references": list(example.references)} if example.references else {}),
            "metric": scored.metric,
            "prediction": scored.predictions[index],
            "score": scored.scores[index],
        }
