"""`adapt`: takes a multi-task run to new tasks with few examples, all (task, seed) runs at once."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import sys
from typing import Any

from flax import linen as nn
import gin
import jax

import moe_peft
from moe_peft import errors, methods
from moe_peft.adaptation import answers, group, initial, report
from moe_peft.adaptation import data as data_lib
from moe_peft.adaptation import groups as groups_lib
from moe_peft.config import gin_files
from moe_peft.evaluation import bootstrap as bootstrap_lib
from moe_peft.evaluation import metrics, questions
from moe_peft.models import encoder_decoder, few_shot, strategies
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import json_files, run_folder
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import optimizers
from moe_peft.training import start as start_lib
from moe_peft.weights import identity

Count = int | Mapping[str, int]


@gin.register(module="training")
def adapt(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    backbone: str = gin.REQUIRED,
    mixture: str = gin.REQUIRED,
    feature_lengths: Mapping[str, int] = gin.REQUIRED,
    task_group: str = gin.REQUIRED,
    shots: Count | None = gin.REQUIRED,
    seeds: Sequence[int] = gin.REQUIRED,
    num_steps: int = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    optimizer: optimizers.Optimizer = gin.REQUIRED,
    model_dir: str = gin.REQUIRED,
    source: str | None = None,
    validation_shots: Count = 0,
    wordings: Count = 1,
    train_split: str = "train",
    validation_split: str | None = None,
    loss: encoder_decoder.LossConfig | None = None,
    few_shot_loss: few_shot.FewShotLoss | None = None,
    selection: str = "validation",
    eval_period: int = 50,
    patience: int | None = None,
    test_split: str = "validation",
    metric: str = "exact_match",
    decoding: strategies.Strategy | None = None,
    rank_choices: bool = False,
    length_normalized_choices: bool = True,
    task_weights: initial.TaskWeights | None = None,
    eval_batch_size: int = 16,
    group_size: int | None = None,
    frozen_dtype: str = "float32",
    save_seconds: float = 60.0,
    bootstrap: bootstrap_lib.Bootstrap | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Adapts `method` to every task of `mixture` with every seed, and reports over seeds.

    All runs are stacked and train in one program, in groups that fit memory; the numbers are those
    of one run after another. Started again with the same settings, it goes on: finished groups are
    kept, the one that was interrupted goes back to its last saved evaluation. Into `model_dir` go
    `results.json`, `table.md`, `predictions.jsonl`, `config.gin` and, for each group, its adapters
    (stacked, safetensors) and the metrics of its runs.

    Args:
      model: an encoder-decoder with T5X's calls, without adapters.
      method: what is adapted and what trains: `@methods.transferred()` of the multi-task run's
        method, or any method that needs no task ids, from fresh adapters.
      backbone: the model's own weights, such as "embedded:cldr_tiny"; see `backbone.load`.
      mixture: name of the SeqIO mixture of new tasks, or of one task.
      feature_lengths: tokens of "inputs" and "targets" at most.
      task_group: regular expression; what in a task's name it is reported under.
      shots: training examples of each task; see `fewshot.Sizes`.
      seeds: of shots, order, new parameters and dropout; each is a run of each task.
      num_steps: updates of a run.
      batch_size: shots of a batch. The incomplete last batch of an epoch is dropped; with fewer
        shots than that, a batch is all of them.
      optimizer: see `optimizers`; clipping and statistics are each run's own.
      model_dir: folder of this adaptation.
      source: folder of the multi-task run, or its exported file; None starts from fresh adapters.
      validation_shots: further examples of the train split, which select and stop.
      wordings: consecutive rows of a task that are one example in other words (templates).
      train_split: where shots come from; "{seed}" in it stands for the run's seed, where a data set
        comes as several samples (CrossFit's "train_{seed}").
      validation_split: where validation examples come from, all of them, likewise; None for
        `validation_shots` of the train split.
      loss: of language modelling.
      few_shot_loss: T-Few's three losses, for tasks with answer choices; None leaves language
        modelling alone.
      selection: which parameters of a run are reported. "validation": those with the best score on
        the validation examples. "reported_split": those with the best score on the reported split
        itself, as T0's, T-Few's successors Poly and MHR report (optimistic). "last": the last ones,
        as T-Few. Of equal scores the lower loss decides, then the earlier step.
      eval_period: steps between evaluations.
      patience: evaluations without a better one after which a run stops; None for never.
      test_split: the reported one.
      metric: of answers in text; see `metrics`. "task" takes the one that each task's benchmark
        reports (CrossFit), for selection too.
      decoding: how answers are decoded, run by run. None decodes nothing, which only exact match
        allows: one forward pass of all runs tells.
      rank_choices: classify tasks with answer choices by rank.
      length_normalized_choices: rank by the mean over tokens (T-Few, MHR), not by the sum.
      task_weights: job -> weights of the source's tasks, for the variant "soup".
      eval_batch_size: examples of each run that are evaluated at once.
      group_size: runs that train at once; None takes as many as fit the memory.
      frozen_dtype: "float32", or "bfloat16" for half the memory.
      save_seconds: an evaluation is saved if the last one saved is older.
      bootstrap: how intervals are found ("templates" are seeds here); None for none.
      mesh: devices over which the runs of a group are split; default: all of them.

    Returns:
      The content of results.json.

    Raises:
      UserError: a setting, the source, the data or the folder is wrong. Before compiling.
    """
    from moe_peft.data import fewshot, lookup  # Imports TensorFlow.

    settings = group.Settings(num_steps, batch_size, eval_period, selection, patience, save_seconds)
    has_validation = validation_shots != 0 or validation_split is not None
    _check(settings, seeds, has_validation, metric, decoding, group_size, eval_batch_size)
    lookup.check_vocabulary(mixture, model.config.vocab_size)
    names = [task.name for task in lookup.tasks_of(mixture)]
    pattern = questions.compile_group(task_group)
    report_under = {name: questions.group_of(name, pattern) for name in names}
    sizes = fewshot.Sizes(shots, validation_shots, wordings)
    own = {task.name: lookup.reporting(task).metric for task in lookup.tasks_of(mixture)}
    metric_of = metrics.of_tasks(metric, own)
    needs_choices = few_shot_loss is not None and few_shot_loss.needs_choices
    tasks = {
        name: fewshot.Task(
            name,
            feature_lengths,
            test_split,
            needs_choices or rank_choices,
            train_split,
            validation_split,
        )
        for name in names
    }
    data = data_lib.read(tasks, sizes, seeds, feature_lengths, needs_choices, rank_choices)
    if selection == "validation":
        _check_validation(data)

    loss = loss or encoder_decoder.LossConfig()
    network = encoder_decoder.EncoderDecoder(method.patch(model), loss, method)
    first = data_lib.arrays(data[0].shots, slice(0, batch_size), data[0].shape)
    start = initial.Start(
        start_lib.Start(
            network,
            encoder_decoder.EncoderDecoder(model, loss),
            method,
            {name: rows.shape for name, rows in first.items() if name != few_shot.GOLD},
        ),
        backbone,
        source,
        frozen_dtype,
        task_weights,
    )
    description = identity.as_json(
        {
            "method": method.describe(),
            "model": identity.describe_model(model),
            "backbone_spec": backbone,
            "backbone": {"fingerprint": start.fingerprint, "frozen_dtype": frozen_dtype},
            "source": {"folder": source, "step": start.source_step},
            "optimizer": optimizer.describe(),
            "loss": {
                "language_modelling": dataclasses.asdict(loss),
                "few_shot": few_shot_loss and dataclasses.asdict(few_shot_loss),
            },
            "data": {
                "mixture": mixture,
                "feature_lengths": dict(feature_lengths),
                "shots": shots,
                "validation_shots": validation_shots,
                "wordings": wordings,
                "train_split": train_split,
                "validation_split": validation_split,
                "test_split": test_split,
                "seeds": list(seeds),
            },
            "training": {**dataclasses.asdict(settings), "save_seconds": None},
            "evaluation": {
                "metric": metric,
                "decoding": repr(decoding) if decoding else "none (one forward pass)",
                "rank_choices": rank_choices,
                "length_normalized_choices": length_normalized_choices,
            },
        }
    )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder.opened(model_dir))
        progress = progress_lib.Runs(num_steps, len(data))
        stack.callback(progress.close)
        groups = groups_lib.Groups(
            network=network,
            few_shot_loss=few_shot_loss or few_shot.FewShotLoss(1.0, 0.0, 0.0),
            start=start,
            make_optimizer=functools.partial(optimizer.build, group_of=method.learning_rate_group),
            settings=settings,
            evaluation=answers.Evaluation(
                metrics=metric_of,
                decoding=_with_length(decoding, feature_lengths),
                is_length_normalized=length_normalized_choices,
                batch_size=eval_batch_size,
                feature_lengths=dict(feature_lengths),
                vocabulary=lookup.vocabulary(mixture),
            ),
            folder=folder,
            mesh=mesh_lib.make_mesh() if mesh is None else mesh,
            progress=progress,
        )
        finished = groups.run(data, description, group_size)
        gin_files.write_config(folder)
    rows = [{**row, "group": report_under[row["task"]]} for f in finished for row in f.rows()]
    order = {one.job: place for place, one in enumerate(data)}
    rows.sort(key=lambda row: (order[data_lib.Job(row["task"], row["seed"])], row["index"]))
    results = {
        "moe_peft_version": moe_peft.__version__,
        "settings": description,
        "trainable_parameters": start.num_trainable,
        "seconds": round(sum(f.seconds for f in finished), 1),
        "bootstrap": bootstrap and dataclasses.asdict(bootstrap),
        **report.of_rows(rows, bootstrap),
        "runs": sorted(
            (run for f in finished for run in f.runs),
            key=lambda run: order[data_lib.Job(run["task"], run["seed"])],
        ),
    }
    json_files.write_jsonl(folder / "predictions.jsonl", rows)
    json_files.write_json(folder / "results.json", results)
    table = report.markdown(results)
    json_files.write_text(folder / "table.md", table)
    print(table)
    print(f"Written to {folder}.", file=sys.stderr)
    return results


def _check(settings, seeds, has_validation, metric, decoding, group_size, eval_batch_size):
    """Refuses what cannot work, before any data is read."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise errors.UserError(
            f"seeds is {tuple(seeds)}; expected different numbers, at least one."
        )
    if settings.selection == "validation" and not has_validation:
        raise errors.UserError(
            "selection='validation' needs examples to select on: give validation_shots or "
            "validation_split, or choose selection='last'."
        )
    if metric != metrics.OF_TASK:
        metrics.get(metric)
    if decoding is None and metric != "exact_match":
        raise errors.UserError(
            f"The metric {metric!r} needs answers in text: give adapt.decoding, such as "
            "@decoding.Greedy()."
        )
    for name, value in (("group_size", group_size), ("eval_batch_size", eval_batch_size)):
        if value is not None and value < 1:
            raise errors.UserError(f"{name} must be at least 1, got {value}.")


def _check_validation(data: Sequence[data_lib.JobData]) -> None:
    for one in data:
        if not len(one.validation):
            raise errors.UserError(
                f"selection='validation' has no examples to select on for {one.job.task!r}: raise "
                "its validation_shots, or choose selection='last'."
            )


def _with_length(
    decoding: strategies.Strategy | None, lengths: Mapping[str, int]
) -> strategies.Strategy | None:
    if decoding is None or decoding.max_decode_length is not None:
        return decoding
    return dataclasses.replace(decoding, max_decode_length=lengths["targets"])
