"""`adapt`: takes a multi-task run to new tasks with few examples, all (task, seed) runs at once."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any

from flax import linen as nn
import jax

import moe_peft
from moe_peft import errors, methods
from moe_peft.adaptation import data as data_lib
from moe_peft.adaptation import group, initial, report, scores
from moe_peft.adaptation import groups as groups_lib
from moe_peft.config import gin_files
from moe_peft.config import settings as settings_lib
from moe_peft.evaluation import bootstrap as bootstrap_lib
from moe_peft.evaluation import inference, metrics, questions
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder, few_shot, special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import json_files, run_folder
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import optimizers
from moe_peft.training import start as start_lib
from moe_peft.weights import identity

Count = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(group.Settings):
    """Of `adapt`."""

    # An encoder-decoder with T5X's calls, without adapters.
    model: nn.Module
    # What is adapted and what trains: `@methods.transferred()` of the multi-task run's method, or
    # any method that needs no task ids, from fresh adapters.
    method: methods.Method
    # The model's own weights, such as "embedded:cldr_tiny"; see `backbone.load`.
    backbone: str
    mixture: str  # name of the SeqIO mixture of new tasks, or of one task
    feature_lengths: Mapping[str, int]  # tokens of "inputs" and "targets" at most
    task_group: str  # regular expression; what in a task's name it is reported under
    shots: Count | None  # training examples of each task; see `fewshot.Sizes`
    # Of shots, order, new parameters and dropout; each is a run of each task.
    seeds: Sequence[int]
    optimizer: optimizers.Optimizer  # clipping and statistics are each run's own
    model_dir: str  # folder of this adaptation
    # Folder of the multi-task run, or its exported file; None starts from fresh adapters.
    source: str | None = None
    # Further examples of the train split, which select and stop.
    validation_shots: Count = 0
    # Consecutive rows of a task that are one example in other words (templates).
    wordings: Count = 1
    # Where shots come from; "{seed}" in it stands for the run's seed, where a data set comes as
    # several samples (CrossFit's "train_{seed}").
    train_split: str = "train"
    # Where validation examples come from, all of them; "{seed}" as in `train_split`. None for
    # `validation_shots` of the train split.
    validation_split: str | None = None
    loss: encoder_decoder.LossConfig | None = None  # of language modelling
    # T-Few's three losses, for tasks with answer choices; None: language modelling only.
    few_shot_loss: few_shot.FewShotLoss | None = None
    test_split: str = "validation"  # the reported one
    # Of answers in text; see `metrics`. "task" takes the one that each task's benchmark reports
    # (CrossFit), for selection too.
    metric: str = "exact_match"
    # How answers are decoded, run by run. None decodes nothing, which only exact match allows: one
    # forward pass of all runs tells.
    decoding: decoding_lib.Strategy | None = None
    rank_choices: bool = False  # classify tasks with answer choices by rank
    # Rank by the mean over tokens (T-Few, MHR), not by the sum.
    length_normalized_choices: bool = True
    # Job -> weights of the source's tasks, for the variant "soup".
    task_weights: initial.TaskWeights | None = None
    eval_batch_size: int = 16  # examples of each run that are evaluated at once
    # Runs that train at once; None takes as many as fit the memory.
    group_size: int | None = None
    frozen_dtype: str = "float32"  # or "bfloat16" for half the memory
    # How intervals are found ("templates" are seeds here); None for none.
    bootstrap: bootstrap_lib.Bootstrap | None = None
    # Devices over which the runs of a group are split; default: all of them.
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise errors.UserError(
                f"seeds is {tuple(self.seeds)}; expected different numbers, at least one."
            )
        has_validation = self.validation_shots != 0 or self.validation_split is not None
        if self.selection == "validation" and not has_validation:
            raise errors.UserError(
                "selection='validation' needs examples to select on: give validation_shots or "
                "validation_split, or choose selection='last'."
            )
        if self.metric != metrics.OF_TASK:
            metrics.get(self.metric)
        if self.decoding is None and self.metric != "exact_match":
            raise errors.UserError(
                f"The metric {self.metric!r} needs answers in text: give adapt.decoding, such as "
                "@decoding.Greedy()."
            )
        errors.check_at_least("eval_batch_size", self.eval_batch_size, 1)
        if self.group_size is not None:
            errors.check_at_least("group_size", self.group_size, 1)


@settings_lib.entry_point(Settings, "adapt", module="training")
def adapt(settings: Settings) -> dict[str, Any]:
    """Adapts `method` to every task of `mixture` with every seed, and reports over seeds.

    All runs are stacked and train in one program, in groups that fit memory; the numbers are those
    of one run after another. Started again with the same settings, it goes on: finished groups are
    kept, the one that was interrupted goes back to its last saved evaluation. Into `model_dir` go
    `results.json` (which is returned), `table.md`, `predictions.jsonl`, `config.gin` and, for each
    group, its adapters (stacked, safetensors) and the metrics of its runs. A setting, source,
    folder or data that is wrong raises UserError before anything compiles.
    """
    from moe_peft.data import identity as identity_of_rows  # Imports TensorFlow.
    from moe_peft.data import lookup

    ids = special_ids.of(settings.model)
    lookup.check_vocabulary(settings.mixture, settings.model.config.vocab_size, ids)
    tasks = lookup.tasks_of(settings.mixture)
    pattern = questions.compile_group(settings.task_group)
    report_under = {task.name: questions.group_of(task.name, pattern) for task in tasks}
    own = {task.name: lookup.reporting(task).metric for task in tasks}
    lengths, decoding = dict(settings.feature_lengths), settings.decoding
    evaluation = scores.Evaluation(
        metrics=metrics.of_tasks(settings.metric, own),
        decoding=decoding and inference.limited(decoding, lengths["targets"]),
        is_length_normalized=settings.length_normalized_choices,
        batch_size=settings.eval_batch_size,
        feature_lengths=lengths,
        vocabulary=lookup.vocabulary(settings.mixture),
    )
    data = _read_data(settings, list(report_under))
    network, start = _load_start(settings, data[0])
    seen = {"gin": identity_of_rows.settings_of(tasks), "seen": data_lib.digest(data)}
    description = {**_describe(settings, start), "rows": seen}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder.locked(settings.model_dir))
        progress = progress_lib.Runs(settings.num_steps, len(data))
        stack.callback(progress.close)
        build, group_of = settings.optimizer.build, settings.method.learning_rate_group
        groups = groups_lib.Groups(
            network=network,
            few_shot_loss=settings.few_shot_loss or few_shot.FewShotLoss(1.0, 0.0, 0.0),
            start=start,
            make_optimizer=functools.partial(build, group_of=group_of),
            settings=settings,
            evaluation=evaluation,
            folder=folder,
            mesh=mesh_lib.make_mesh() if settings.mesh is None else settings.mesh,
            progress=progress,
        )
        finished = groups.run(data, description, settings.group_size)
        gin_files.write_config(folder)
    order = {one.job: place for place, one in enumerate(data)}
    place = lambda row: order[data_lib.Job(row["task"], row["seed"])]
    rows = [{**row, "group": report_under[row["task"]]} for f in finished for row in f.rows()]
    rows.sort(key=lambda row: (place(row), row["index"]))
    runs = sorted((run for f in finished for run in f.runs), key=place)
    seconds = round(sum(f.seconds for f in finished), 1)
    facts = {"settings": description, "trainable_parameters": start.num_trainable}
    return _write_results(folder, {**facts, "seconds": seconds}, rows, runs, settings.bootstrap)


def _read_data(settings: Settings, names: Sequence[str]) -> list[data_lib.JobData]:
    """Reads the examples of every (task, seed)."""
    from moe_peft.data import fewshot  # Imports TensorFlow.

    few_shot_loss, lengths = settings.few_shot_loss, settings.feature_lengths
    train_on_choices = few_shot_loss is not None and few_shot_loss.needs_choices
    with_choices = train_on_choices or settings.rank_choices
    more = (settings.train_split, settings.validation_split, special_ids.of(settings.model))
    of_name = lambda n: fewshot.Task(n, lengths, settings.test_split, with_choices, *more)
    tasks = {name: of_name(name) for name in names}
    sizes = fewshot.Sizes(settings.shots, settings.validation_shots, settings.wordings)
    choices = (train_on_choices, settings.rank_choices)
    data = data_lib.read(tasks, sizes, settings.seeds, lengths, *choices)
    for one in data:
        if settings.selection == "validation" and not len(one.validation):
            raise errors.UserError(
                f"selection='validation' has no examples to select on for {one.job.task!r}: raise "
                "its validation_shots, or choose selection='last'."
            )
    return data


def _load_start(
    settings: Settings, one: data_lib.JobData
) -> tuple[encoder_decoder.EncoderDecoder, initial.Start]:
    """Returns the network with adapters, and what its runs start from."""
    loss = settings.loss or encoder_decoder.LossConfig()
    model, method = settings.model, settings.method
    network = encoder_decoder.EncoderDecoder(method.patch(model), loss, method)
    base = encoder_decoder.EncoderDecoder(model, loss)
    batch = data_lib.arrays(one.shots, slice(0, settings.batch_size), one.shape)
    shapes = {name: rows.shape for name, rows in batch.items() if name != few_shot.GOLD}
    start = start_lib.Start(network, base, method, shapes)
    how = (settings.backbone, settings.source, settings.frozen_dtype, settings.task_weights)
    return network, initial.Start(start, *how)


def _describe(settings: Settings, start: initial.Start) -> dict[str, Any]:
    """Returns what must stay the same when an adaptation goes on, as json types."""
    own = lambda *names: {name: getattr(settings, name) for name in names}
    loss, few_shot_loss = settings.loss or encoder_decoder.LossConfig(), settings.few_shot_loss
    numbers = own(*(field.name for field in dataclasses.fields(group.Settings)))
    description = {
        "method": settings.method.describe(),
        "model": identity.describe_model(settings.model),
        "backbone_spec": settings.backbone,
        "backbone": {"fingerprint": start.fingerprint, **own("frozen_dtype")},
        "source": {"folder": settings.source, "step": start.source_step},
        "optimizer": settings.optimizer.describe(),
        "loss": {
            "language_modelling": dataclasses.asdict(loss),
            "few_shot": few_shot_loss and dataclasses.asdict(few_shot_loss),
        },
        "data": {
            "mixture": settings.mixture,
            "feature_lengths": dict(settings.feature_lengths),
            **own("shots", "validation_shots", "wordings"),
            **own("train_split", "validation_split", "test_split"),
            "seeds": list(settings.seeds),
        },
        "training": {**numbers, "save_seconds": None},
        "evaluation": {
            "metric": settings.metric,
            "decoding": repr(settings.decoding) if settings.decoding else "none (one forward pass)",
            **own("rank_choices", "length_normalized_choices"),
        },
    }
    return identity.as_json(description)


def _write_results(
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    rows: Sequence[report.Row],
    runs: Sequence[Mapping[str, Any]],
    bootstrap: bootstrap_lib.Bootstrap | None,
) -> dict[str, Any]:
    """Writes predictions, results and table, prints the table, and returns the results."""
    results = {
        "moe_peft_version": moe_peft.__version__,
        **facts,
        "bootstrap": bootstrap and dataclasses.asdict(bootstrap),
        **report.summarize_rows(rows, bootstrap),
        "runs": list(runs),
    }
    json_files.write_jsonl(folder / "predictions.jsonl", rows)
    json_files.write_json(folder / "results.json", results)
    table = report.markdown(results)
    json_files.write_text(folder / "table.md", table)
    print(table)
    print(f"Written to {folder}.", file=sys.stderr)
    return results
