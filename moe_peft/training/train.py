"""`train`: adapts a frozen backbone on a mixture, or goes on where an earlier run stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from typing import Any

from flax import linen as nn
import jax
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.config import settings as settings_lib
from moe_peft.data import identity as data_identity
from moe_peft.data import lookup, pipeline, task_ids
from moe_peft.models import encoder_decoder, special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import prefetch, processes, run_folder, signals
from moe_peft.training import checkpoints, loop, optimizers, rate_search, summary
from moe_peft.training import program as program_lib
from moe_peft.training import start as start_lib
from moe_peft.training import step as step_lib
from moe_peft.training.monitors import base as monitors_lib
from moe_peft.weights import identity, saved_run

_KNOWN_BEFORE_WEIGHTS = ("method", "model", "data", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(loop.Settings):
    """Of `train`."""

    # An encoder-decoder with T5X's calls, without adapters.
    model: nn.Module
    method: methods.Method  # what is adapted and what trains
    # The model's own weights, such as "embedded:cldr_tiny"; see `backbone.load`.
    backbone: str
    mixture: lookup.Mixture  # name of a SeqIO mixture or task, or `files.Files`
    feature_lengths: Mapping[str, int]  # tokens of "inputs" and "targets"
    optimizer: optimizers.Optimizer  # see `optimizers`
    model_dir: str  # folder of the run: checkpoints, metrics.jsonl, tensorboard
    # How token losses become the objective; None for `LossConfig()`.
    loss: encoder_decoder.LossConfig | None = None
    pack: bool = False  # several examples in a row
    # (model, step, params) -> metrics, called every `eval_period` steps and at the end.
    evaluator: Callable[[Any, int, PyTree], Mapping[str, float]] | None = None
    # Called every so many steps and at the end; see `monitors`.
    monitors: Sequence[monitors_lib.Monitor] = ()
    # Folder of a multi-task run that `method` (made by `methods.transferred`, variant "mu" or
    # "keep") takes its first parameters from: zero-shot with extra steps, as in "Multi-Head Adapter
    # Routing", section 5. None for fresh adapters.
    start_from: str | None = None
    # Devices; default: all of them, data-parallel. `partitioning.Layout` says how weights are split
    # over its axes `fsdp` and `model`.
    mesh: jax.sharding.Mesh | None = None


@settings_lib.entry_point(Settings, "train", module="training")
def train(settings: Settings) -> loop.Result:
    """Trains `method` on `mixture` until `num_steps` updates are made, and saves as it goes.

    Run again with the same settings, it goes on from the newest checkpoint, to the very same
    numbers as if it had never stopped. SIGTERM and Ctrl-C save first, then exit. A setting, folder,
    backbone or data that is wrong raises UserError before anything compiles.
    """
    model, method = settings.model, settings.method
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is not None:
        pipeline.check_vocabulary(settings.mixture, vocab_size, special_ids.of(model))
    loss = settings.loss or encoder_decoder.LossConfig()
    network = encoder_decoder.EncoderDecoder(method.patch(model), loss, method)
    base = encoder_decoder.EncoderDecoder(model, loss)
    evaluator = settings.evaluator
    _check_tasks(method, settings.mixture, settings.pack, settings.start_from)
    task_ids.check_declared(method, settings.mixture)
    if evaluator is not None and jax.process_count() > 1:
        raise errors.UserError(
            f"train.evaluator works in one process, and this run has {jax.process_count()}. Leave "
            "it out, and use `moe-peft eval` afterwards."
        )
    mesh = mesh_lib.make_mesh() if settings.mesh is None else settings.mesh
    started = time.monotonic()
    result = fit(
        start=lambda shapes: start_lib.Start(network, base, method, shapes),
        backbone=settings.backbone,
        open_batches=functools.partial(_open_batches, settings, mesh),
        optimizer=settings.optimizer,
        model_dir=settings.model_dir,
        described=_describe(settings, loss),
        describe_rows=functools.partial(_describe_rows, settings),
        introduce=functools.partial(summary.introduce, settings, mesh),
        settings=settings,
        eval_hook=functools.partial(evaluator, network) if evaluator else None,
        start_from=settings.start_from,
        monitors=settings.monitors,
        mesh=mesh,
    )
    summary.conclude(settings, result.metrics, time.monotonic() - started)
    return result


def _open_batches(settings: Settings, mesh: jax.sharding.Mesh, start_batch: int) -> Iterator:
    """Returns this process's rows of all batches from `start_batch` on."""
    lengths = dict(settings.feature_lengths)
    what = (settings.mixture, settings.batch_size, lengths, settings.seed, settings.pack)
    ids = special_ids.of(settings.model)
    batches = pipeline.train_batches(*what, start_batch, *mesh_lib.host_shard(mesh), ids=ids)
    return task_ids.checked_batches(batches, settings.method, settings.mixture)


def _describe(settings: Settings, loss: encoder_decoder.LossConfig) -> dict[str, Any]:
    """Returns what must stay the same when a run goes on."""
    data = {name: getattr(settings, name) for name in ("batch_size", "pack", "seed")}
    data["mixture"] = getattr(settings.mixture, "described", settings.mixture)
    found = {
        "model": {**identity.describe_model(settings.model), "loss": dataclasses.asdict(loss)},
        "data": {**data, "feature_lengths": dict(settings.feature_lengths)},
    }
    # For whoever asks the run later, from elsewhere; not compared.
    asking = getattr(settings.mixture, "asking", None)
    return found | ({"files": asking()} if asking else {})


def _describe_rows(settings: Settings) -> dict[str, Any]:
    """Returns what shapes the rows besides the settings of the run; the same in every process."""
    lengths = dict(settings.feature_lengths)
    numbers = (settings.batch_size, settings.seed, settings.pack)
    return data_identity.describe(settings.mixture, lengths, *numbers)


def _check_tasks(
    method: methods.Method, mixture: lookup.Mixture, pack: bool, start_from: str | None
) -> None:
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
    describe_rows: Callable[[], Mapping[str, Any]] = dict,
    introduce: Callable[[int, int], None] = lambda trainable, own: None,
    eval_hook: loop.EvalHook | None = None,
    monitors: Sequence[monitors_lib.Monitor] = (),
    start_from: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> loop.Result:
    """Trains as `train` does, for any model with `init` and `loss_sums` and any batches.

    Args (the others are in `Settings`):
      start: batch shapes -> models and method.
      open_batches: number of batches already consumed -> iterator over the following ones.
      described: {"model": ..., "data": ...}, json types; a resumed run must have the same.
      describe_rows: what shapes the rows besides, json types, compared in the same way.
      introduce: is told the numbers of trainable parameters and of the network's own.
      eval_hook: (step, params) -> metrics.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    mesh_lib.check_batch_size(settings.batch_size, settings.num_microbatches, mesh)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder.locked(model_dir))
        stop = stack.enter_context(signals.StopRequest())
        stack.enter_context(jax.set_mesh(mesh))
        saved = processes.in_turn(lambda: checkpoints.load_newest(folder), "checkpoints")
        first_step = saved.step if saved else 0
        place = functools.partial(mesh_lib.put_batch, sharding=mesh_lib.batch_sharding(mesh))
        batches = stack.enter_context(prefetch.Prefetch(open_batches(first_step), place))
        first_batch = loop.next_batch(batches, 1 + first_step)
        if rows := describe_rows():  # The data has been read and found good.
            described = {**described, "rows": rows}
        begin = start({name: rows.shape for name, rows in first_batch.items()})
        if saved:
            known = identity.as_json({"method": begin.method.describe(), **described})
            identity.check_same_run(saved.description, known, folder, _KNOWN_BEFORE_WEIGHTS)
        program = program_lib.Program(begin, optimizer, settings, mesh)
        num_new = settings.num_new_checkpoints(len(saved_run.steps(folder)))
        run_folder.check_space(folder, step_lib.num_bytes(program.state), num_new)
        begin.check_backbone(backbone)
        introduce(*map(patching.trees.num_parameters, (program.trainable, begin.base_shapes())))
        active = _watchers(program, described["data"], folder, mesh, monitors, eval_hook)
        # The weights come last: everything that can be refused without them has been looked at.
        frozen, state, description = program.load(backbone, start_from, described)
        if settings.searches_rate:
            program = _find_rate(program, saved, frozen, state, open_batches(0))
            description |= program.describe_rate()
        if saved:
            identity.check_same_run(saved.description, description, folder)
            state = checkpoints.restore(saved, state)
        warnings = start_lib.warnings(saved.description, description) if saved else []
        run = loop.Run(settings, description, program.make_step(), frozen, stop, active)
        batches = itertools.chain([first_batch], batches)
        return run.make_steps(folder, state, saved, batches, warnings)


def _watchers(program, data, folder, mesh, monitors, eval_hook) -> list[monitors_lib.Active]:
    """Returns what is called every so many steps."""
    begin = program.begin
    # A user's own files are an object, which the description only names.
    if mixture := getattr(program.settings, "mixture", None):
        data = {**data, "mixture": mixture}
    what = (begin.model, begin.method, program.trainable, data, folder, mesh)
    active = monitors_lib.start(monitors, monitors_lib.Watched(*what))
    if eval_hook is None:
        return active
    watch = lambda step, *trees: eval_hook(step, patching.merge(*trees))
    return [monitors_lib.Active("eval", program.settings.eval_period, watch), *active]


def _find_rate(
    program: program_lib.Program,
    saved: saved_run.Saved | None,
    frozen: PyTree,
    state,
    batches: Iterator,
) -> program_lib.Program:
    """Returns the program with the best learning rate, or with that of a run that goes on."""
    if saved:
        return program.scaled(saved.description.get("rate_factor", 1.0))
    what = (program.begin.model, program.begin.method, program.optimizer)
    what += (program.settings.num_steps, frozen, state.trainable, batches)
    found = rate_search.find(*what)
    if processes.is_first():
        print(found.text, file=sys.stderr, flush=True)
    return program.scaled(found.factor)
