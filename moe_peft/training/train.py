"""`train`: adapts a frozen backbone on a mixture, or goes on where an earlier run stopped."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import pathlib
from typing import Any

from flax import linen as nn
import gin
import jax
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import prefetch, processes, run_folder, signals
from moe_peft.training import checkpoints, loop, optimizers
from moe_peft.training import start as start_lib
from moe_peft.training import step as step_lib
from moe_peft.training.monitors import base as monitors_lib
from moe_peft.weights import identity, saved_run


@gin.register(module="training")
def train(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    backbone: str = gin.REQUIRED,
    mixture: str = gin.REQUIRED,
    feature_lengths: Mapping[str, int] = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    num_steps: int = gin.REQUIRED,
    optimizer: optimizers.Optimizer = gin.REQUIRED,
    model_dir: str = gin.REQUIRED,
    seed: int = 0,
    loss: encoder_decoder.LossConfig | None = None,
    pack: bool = False,
    num_microbatches: int = 1,
    frozen_dtype: str = "float32",
    checkpoint_period: int = 1_000,
    keep: int = 3,
    log_period: int = 100,
    evaluator: Callable[[Any, int, PyTree], Mapping[str, float]] | None = None,
    eval_period: int = 1_000,
    monitors: Sequence[monitors_lib.Monitor] = (),
    start_from: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> loop.Result:
    """Trains `method` on `mixture` until `num_steps` updates are made, and saves as it goes.

    Run again with the same settings, it goes on from the newest checkpoint, to the very same
    numbers as if it had never stopped. SIGTERM and Ctrl-C save first, then exit.

    Args:
      model: an encoder-decoder with T5X's calls, without adapters.
      method: what is adapted and what trains.
      backbone: the model's own weights, such as "embedded:cldr_tiny"; see `backbone.load`.
      mixture: name of a SeqIO mixture or task.
      feature_lengths: tokens of "inputs" and "targets".
      batch_size: rows of a batch, over all devices and micro-batches.
      num_steps: updates in all, earlier ones of the same run included.
      optimizer: see `optimizers`.
      model_dir: folder of the run: checkpoints, metrics.jsonl, tensorboard.
      seed: of fresh adapters, dropout and the order of the data.
      loss: how token losses become the objective.
      pack: several examples in a row.
      num_microbatches: parts a batch is computed in, to save memory; same result.
      frozen_dtype: "float32", or "bfloat16" for half the memory.
      checkpoint_period: steps between checkpoints; there is always one at the end.
      keep: newest checkpoints that are kept.
      log_period: steps between lines of metrics.jsonl.
      evaluator: (model, step, params) -> metrics, called every `eval_period` steps and at the end.
      eval_period: steps.
      monitors: looked through every so many steps and at the end; see `monitors`.
      start_from: folder of a multi-task run that `method` (made by `methods.transferred`, variant
        "mu" or "keep") takes its first parameters from: zero-shot with extra steps, as in "Multi-
        Head Adapter Routing", section 5. None for fresh adapters.
      mesh: devices; default: all of them, data-parallel. `partitioning.Layout` says how weights are
        split over its axes `fsdp` and `model`.

    Raises:
      UserError: a setting, the folder, the backbone or the data is wrong. Before compiling.
    """
    from moe_peft.data import pipeline, task_ids  # Imports TensorFlow.

    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is not None:
        pipeline.check_vocabulary(mixture, vocab_size)
    loss = loss or encoder_decoder.LossConfig()
    network = encoder_decoder.EncoderDecoder(method.patch(model), loss, method)
    data = {
        "mixture": mixture,
        "batch_size": batch_size,
        "feature_lengths": dict(feature_lengths),
        "pack": pack,
        "seed": seed,
    }

    _check_tasks(method, mixture, pack, start_from)
    if evaluator is not None and jax.process_count() > 1:
        raise errors.UserError(
            f"train.evaluator works in one process, and this run has {jax.process_count()}. Leave "
            "it out, and use `moe-peft eval` afterwards."
        )
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    shard_index, shard_count = mesh_lib.host_shard(mesh)

    def open_batches(start_batch: int) -> loop.Batches:
        batches = pipeline.train_batches(
            mixture,
            batch_size,
            dict(feature_lengths),
            seed,
            pack=pack,
            start_batch=start_batch,
            shard_index=shard_index,
            shard_count=shard_count,
        )
        return task_ids.checked(batches, method, mixture)

    base = encoder_decoder.EncoderDecoder(model, loss)
    return fit(
        start=lambda shapes: start_lib.Start(network, base, method, shapes),
        backbone=backbone,
        open_batches=open_batches,
        optimizer=optimizer,
        model_dir=model_dir,
        described={"model": _describe_model(model, loss), "data": data},
        settings=loop.Settings(
            num_steps=num_steps,
            batch_size=batch_size,
            seed=seed,
            num_microbatches=num_microbatches,
            frozen_dtype=frozen_dtype,
            checkpoint_period=checkpoint_period,
            keep=keep,
            log_period=log_period,
            eval_period=eval_period,
        ),
        eval_hook=functools.partial(evaluator, network) if evaluator else None,
        start_from=start_from,
        monitors=monitors,
        mesh=mesh,
    )


def _check_tasks(method: methods.Method, mixture: str, pack: bool, start_from: str | None) -> None:
    """Refuses what would be silently wrong, or could not be restored."""
    if pack and method.num_tasks is not None:
        raise errors.UserError(
            f"{method.name!r} combines its modules for each example's task, and packed rows mix "
            "examples of several tasks. Set train.pack = False."
        )
    variant = method.transfer.variant if method.transfer else None
    if start_from is not None and variant not in ("mu", "keep"):
        raise errors.UserError(
            f"train.start_from goes on with {mixture!r} from a multi-task run, so METHOD has "
            f"to be `@methods.transferred()` of variant 'mu' or 'keep', not {variant!r}. For new "
            "tasks use `moe-peft adapt`."
        )
    if start_from is None and variant is not None:
        raise errors.UserError(
            f"{method.name!r} starts from a multi-task run: give its folder as train.start_from, "
            "or use `moe-peft adapt`."
        )


def fit(
    start: Callable[[Mapping[str, tuple[int, ...]]], start_lib.Start],
    backbone: str,
    open_batches: Callable[[int], loop.Batches],
    optimizer: optimizers.Optimizer,
    model_dir: str | pathlib.Path,
    described: Mapping[str, Any],
    settings: loop.Settings,
    eval_hook: loop.EvalHook | None = None,
    monitors: Sequence[monitors_lib.Monitor] = (),
    start_from: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> loop.Result:
    """The loop of `train`, for any model with `init` and `loss_sums` and any batches.

    Args:
      start: batch shapes -> models and method.
      backbone: see `train`.
      open_batches: number of batches already consumed -> iterator over the following ones.
      optimizer: see `train`.
      model_dir: see `train`.
      described: {"model": ..., "data": ...}, json types; a resumed run must have the same.
      settings: numbers and periods.
      eval_hook: (step, params) -> metrics.
      monitors: see `train`.
      start_from: see `train`.
      mesh: see `train`.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    mesh_lib.check_batch_size(settings.batch_size, settings.num_microbatches, mesh)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder.opened(model_dir))
        stop = stack.enter_context(signals.StopRequest())
        stack.enter_context(jax.set_mesh(mesh))

        saved = processes.in_turn(lambda: checkpoints.load_newest(folder), "checkpoints")
        put = functools.partial(mesh_lib.put_batch, sharding=mesh_lib.batch_sharding(mesh))
        source = open_batches(saved.step if saved else 0)
        batches = stack.enter_context(prefetch.Prefetch(source, put))
        first_batch = loop.next_batch(batches, 1 + (saved.step if saved else 0))
        begin = start({name: rows.shape for name, rows in first_batch.items()})

        group_of = begin.method.learning_rate_group
        trainable = begin.trainable_shapes()
        transform = optimizer.build(trainable, group_of)
        abstract = jax.eval_shape(
            lambda tree: step_lib.create_state(tree, transform, settings.seed), trainable
        )
        layout, axes = layout_lib.Layout(mesh), begin.logical_axes()
        places = layout.like(abstract, layout.shardings(trainable, axes), trainable)
        num_old = len(saved_run.steps(folder))
        run_folder.check_space(
            folder, step_lib.num_bytes(abstract), settings.num_new_checkpoints(num_old)
        )

        watched = monitors_lib.Watched(
            begin.model, begin.method, trainable, described["data"], folder, mesh
        )
        active = monitors_lib.start(monitors, watched)

        source = start_lib.Source.load(begin.method, start_from) if start_from else None
        trees = begin.trees(backbone, settings.seed, settings.frozen_dtype, source)
        if source is not None:
            source.check_backbone(trees.fingerprint)
            described = {**described, "source": source.describe()}
        description = start_lib.describe(
            begin.method, backbone, trees.fingerprint, settings.frozen_dtype, optimizer, described
        )
        frozen = processes.put(trees.frozen, layout.shardings(trees.frozen, axes))
        state = step_lib.create_state(trees.trainable, transform, settings.seed)
        state = processes.put(state, places)
        changed = ""
        if saved:
            identity.check_same_run(saved.description, description, folder)
            state = checkpoints.restore(saved, state)
            changed = start_lib.optimizer_changes(saved.description, description)

        run = loop.Run(
            settings=settings,
            description=description,
            train_step=step_lib.make_train_step(
                begin.model,
                transform,
                patching.merge,
                settings.num_microbatches,
                optimizer.learning_rates(trainable, group_of),
                settings.use_dropout,
                layout=layout,
                out_shardings=(places, layout.everywhere),
            ),
            eval_hook=eval_hook,
            frozen=frozen,
            stop=stop,
            monitors=active,
        )
        return run.go(folder, state, saved, itertools.chain([first_batch], batches), changed)


def _describe_model(model: nn.Module, loss: encoder_decoder.LossConfig) -> dict[str, Any]:
    """Returns the settings of the network and of the objective."""
    return {**identity.describe_model(model), "loss": dataclasses.asdict(loss)}
