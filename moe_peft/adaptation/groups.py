"""All runs: which train together, one group after another, each kept once finished."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np
import optax

from moe_peft import errors, patching
from moe_peft.adaptation import data as data_lib
from moe_peft.adaptation import group as group_lib
from moe_peft.adaptation import initial, programs, scores
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
_ASSUMED_MEMORY = 4 * 2**30  # of a device that does not tell

Members = Sequence[data_lib.JobData]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A group whose results are on disk."""

    folder: pathlib.Path  # of the group
    seconds: float  # it took, compiling included
    # Json of each run: task, seed, state, steps, chosen_step, score, curve.
    runs: Sequence[Mapping[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every prediction of the group's runs."""
        return json_files.read_jsonl(self.folder / _PREDICTIONS)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Trains and evaluates all jobs, group by group."""

    network: encoder_decoder.EncoderDecoder  # with adapters
    few_shot_loss: few_shot.FewShotLoss
    start: initial.Start
    # Trainable tree -> optimiser of one run.
    make_optimizer: Callable[[PyTree], optax.GradientTransformation]
    settings: group_lib.Settings
    evaluation: scores.Evaluation
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    progress: progress_lib.Runs

    def run(
        self, data: Members, description: Mapping[str, Any], group_size: int | None
    ) -> list[Finished]:
        """Runs what is not finished yet, `group_size` runs at once (None: as many as fit).

        An adaptation that goes on must have the same description.
        """
        by_job = {one.job: one for one in data}
        by_shape: dict[Any, list[data_lib.JobData]] = {}
        for one in data:
            by_shape.setdefault(_shapes(one), []).append(one)
        compiled: dict[Any, programs.MappedRuns] = {}
        plan = self._read_plan(description)
        if plan is None:
            plan = self._make_plan(by_shape, group_size, compiled)
            groups = [[dataclasses.asdict(job) for job in jobs] for jobs in plan]
            record = {"description": description, "groups": groups}
            json_files.write_json(self.folder / FOLDER / _PLAN, record)
        found = []
        for number, jobs in enumerate(plan):
            folder = self.folder / FOLDER / f"{number:03}"
            members = [by_job[job] for job in jobs]
            if not (folder / _FINISHED).exists():
                shapes = _shapes(members[0])
                if shapes not in compiled:
                    widths = [len(jobs) for jobs in plan if _shapes(by_job[jobs[0]]) == shapes]
                    compiled[shapes] = self._map_runs(members[0], max(widths))
                self._run_group(folder, members, compiled[shapes], _num_rows(by_shape[shapes]))
            record = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
            found.append(Finished(folder, record["seconds"], record["runs"]))
        return found

    def _read_plan(self, description) -> list[list[data_lib.Job]] | None:
        path = self.folder / FOLDER / _PLAN
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        saved = record["description"]
        if "rows" not in saved:
            self.progress.say(
                "WARNING: the adaptation that goes on does not say which settings shaped its data "
                "(version 0.1 did not save them): make sure that they are the same here."
            )
            saved = {**saved, "rows": description["rows"]}
        for part in (*_PARTS, "rows"):
            difference = identity.first_difference(saved[part], description[part], part)
            if difference:
                raise errors.UserError(
                    f"{self.folder} holds an adaptation with other settings: {difference}. Choose "
                    "another MODEL_DIR, or go back to those settings."
                )
        return [[data_lib.Job(**job) for job in jobs] for jobs in record["groups"]]

    def _make_plan(self, by_shape, group_size, compiled) -> list[list[data_lib.Job]]:
        """Groups of jobs of one shape each; `compiled` gets what was compiled to find out."""
        plan = []
        for shapes, members in by_shape.items():
            largest = group_size
            if largest is None:
                compiled[shapes], largest = self._compile_largest(members)
            jobs = [one.job for one in members]
            for size in programs.group_sizes(len(jobs), largest):
                plan.append(jobs[:size])
                jobs = jobs[size:]
        return plan

    @functools.cached_property  # What is unknown is said once, not for every shape.
    def _device_memory(self) -> int:
        found = programs.device_memory()
        if found is None:
            self.progress.say(
                f"the memory of a device is unknown, so {_ASSUMED_MEMORY / 1e9:.1f} GB are "
                "assumed; adapt.group_size sets how many runs train at once"
            )
        return _ASSUMED_MEMORY if found is None else found

    def _compile_largest(self, members: Members) -> tuple[programs.MappedRuns, int]:
        """As many runs as fit, compiled, and their number."""
        size, available = len(members), self._device_memory
        while True:
            mapped, started = self._map_runs(members[0], size), time.monotonic()
            needed = mapped.compile(*self._abstract_arguments(mapped, members)).peak
            self.progress.say(
                f"compiled {size} runs at once in {time.monotonic() - started:.1f} s: they need "
                f"{needed / 1e9:.2f} GB of {available / 1e9:.1f}"
            )
            if needed <= available:
                return mapped, size
            shared = step_lib.num_bytes(self.start.frozen)
            fits = programs.largest_group(size, needed, shared, available)
            if fits < 1 or size == 1:
                raise errors.UserError(
                    f"One run needs more memory than there is: {needed / size / 1e9:.1f} GB of "
                    f"{available / 1e9:.1f} GB. Use smaller batches, or frozen_dtype='bfloat16'."
                )
            size = max(programs.group_sizes(size, min(fits, size - 1)))

    def _abstract_arguments(self, mapped, members: Members):
        """Shapes of the arguments of `advance` for the largest group."""
        (trainable,) = self.start.trainables([members[0].job])
        optimizer = self.make_optimizer(trainable)
        state = jax.eval_shape(lambda tree: step_lib.create_state(tree, optimizer, 0), trainable)
        table = data_lib.tables(members[:1], _num_rows(members))
        rows = np.zeros((1, self.settings.eval_period, self.settings.batch_size), np.int32)
        stacked = lambda leaf: mapped.abstract(leaf.shape, leaf.dtype)
        of_one = lambda leaf: mapped.abstract(leaf.shape[1:], leaf.dtype)
        return jax.tree.map(stacked, state), jax.tree.map(of_one, table), of_one(rows)

    def _map_runs(self, one: data_lib.JobData, width: int) -> programs.MappedRuns:
        num_choices = max(one.shape.num_choices, 1)
        model = few_shot.FewShotModel(self.network, self.few_shot_loss, num_choices)
        (trainable,) = self.start.trainables([one.job])
        update = step_lib.make_update(model, self.make_optimizer(trainable), patching.merge)
        num_choices, per_token = one.eval_shape.num_choices, self.evaluation.is_length_normalized
        score = scores.score_rows(self.network, num_choices, per_token)
        return programs.MappedRuns(update, score, self.start.frozen, width, self.mesh)

    def _run_group(self, folder, members: Members, mapped, num_rows) -> None:
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        jobs, size = [one.job for one in members], self.settings.batch_size
        trainables = self.start.trainables(jobs)
        scorer = scores.scorer(self.evaluation, self.network, mapped, members, folder, self.mesh)
        schedule = lambda steps: np.stack([one.schedule(size, steps) for one in members])
        group_data = group_lib.GroupData(jobs, data_lib.tables(members, num_rows), schedule)
        optimizer = self.make_optimizer(trainables[0])
        how = (scorer, self.settings, folder, self.progress)
        group = group_lib.GroupRun(mapped, optimizer, group_data, *how)
        best, runs = group.train(trainables)
        found = list(zip(members, runs, scorer(best, "test"), strict=True))
        group_lib.write_adapters(folder / ADAPTERS, mapped.to_host(best, len(jobs)), jobs)
        rows = [row for one, _, scored in found for row in _prediction_rows(one, scored)]
        json_files.write_jsonl(folder / _PREDICTIONS, rows)
        seconds = round(group.seconds_before + time.monotonic() - started, 1)
        record = {"seconds": seconds, "runs": [_run_record(*each) for each in found]}
        json_files.write_json(folder / _FINISHED, record)
        group.forget_saved()
        scores.forget_answers(folder)


def _shapes(one: data_lib.JobData) -> tuple[data_lib.Shape, data_lib.Shape]:
    """What runs have in common that train together."""
    return one.shape, one.eval_shape


def _num_rows(members: Members) -> int:
    """Rows of every table, so that one program serves all groups of a shape."""
    return max(len(one.shots) for one in members)


def _run_record(one, run: group_lib.RunProgress, scored: scores.Scored) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one.job),
        "state": run.state,
        "steps": run.steps,
        "chosen_step": run.best_step,
        "selection_score": run.best_score,
        "score": scored.score,
        "num_shots": one.num_shots,
        "num_test_examples": len(one.test),
        "curve": run.curve,
    }


def _prediction_rows(one: data_lib.JobData, scored: scores.Scored) -> Iterator[dict[str, Any]]:
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
