"""`convert`: backbones and adapters from one format into another, verified before they appear."""

from collections.abc import Sequence
import dataclasses
import pathlib
import time

from moe_peft import errors
from moe_peft.convert import (
    adapter_folder,
    adapter_trees,
    averaging,
    foreign,
    merge,
    models,
    single_task,
    targets,
)
from moe_peft.convert.peft import adapters
from moe_peft.weights import (
    checkpoint_file,
    formats,
    leaves,
    locations,
    records,
    saved_run,
    t5_sizes,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be asked of a conversion."""

    base: str | None = None  # backbone of an adapter, "hf:FOLDER"; None: the one its run names
    merge: bool = False  # fold the adapter into its backbone
    task: int | None = None  # id of the task that a task-routed adapter is merged or taken for
    member: str | None = None  # which run of an adaptation, "TASK:SEED"
    step: int | None = None  # which checkpoint of a run; None for the newest
    weights: Sequence[float] | None = None  # of an average; None for equal ones
    dtype: str | None = None  # "float32", "bfloat16"; None keeps a model's, adapters are float32
    scan_layers: bool | None = None  # of a model's leaves; None keeps it. Hugging Face: one layout
    t5x_layout: str = "legacy"  # or "orbax"
    overwrite: bool = False  # replace what is there, if it is of the same format
    seed: int = 0  # of the random batch


def convert(sources: Sequence[str], to: str, options: Options) -> targets.Place:
    """Writes what `sources` name to `to`, and returns where that is.

    One source is converted; several are averaged. What was written is read again and compared
    before it gets its name: adapters layer by layer, models leaf by leaf and by their logits.
    Nothing is written after a UserError: something is not there, or cannot be read or expressed.

    Args:
      sources: "PATH" or "FORMAT:PATH" each.
      to: "FORMAT:FOLDER", "FILE.safetensors" or, where there is only one choice, "FOLDER";
        "ours:FOLDER" is an adapter folder.
      options: what else is asked.
    """
    found = [targets.source(spec) for spec in sources]
    contents = [_open(place, options) for place in found]
    names = [str(place) for place in found]
    if len(contents) > 1:
        name, content = " and ".join(names), _average(names, contents, options)
    else:
        (name,), (content,) = names, contents
    if isinstance(content, saved_run.Saved) and content.description["method"]["name"] == "full":
        config = records.network(content.description, name).config
        flat = leaves.flatten(content.trainable)
        content = checkpoint_file.CheckpointFile(name, config, flat)
    if isinstance(content, checkpoint_file.CheckpointFile):
        return _convert_model(content, found[0], to, options)
    if options.merge:
        return _merge(content, name, to, options)
    return _convert_adapter(content, name, to, options)


def _open(
    place: targets.Place, options: Options
) -> saved_run.Saved | checkpoint_file.CheckpointFile:
    if place.kind == targets.RUN:
        return saved_run.load(place.path, options.step, options.member)
    for name in ("member", "step"):
        if getattr(options, name) is not None:
            raise errors.UserError(f"{place} is not a folder of runs, so it has no --{name}.")
    if place.kind in foreign.KINDS:
        saved = foreign.read(place, options.base)
        for line in saved.description.get("gin", ()):
            print(line)
        return saved
    if place.kind == formats.ADAPTERS and saved_run.is_adapter_file(place.path):
        return saved_run.load(place.path)
    return formats.open_backbone(place.path, place.kind)


def _average(names, contents, options: Options) -> saved_run.Saved:
    for name, content in zip(names, contents, strict=True):
        if not isinstance(content, saved_run.Saved):
            raise errors.UserError(f"{name} is not an adapter; --average takes adapters.")
    if len(set(names)) < len(names):
        raise errors.UserError(f"--average names {', '.join(names)}: one of them twice.")
    return averaging.average(dict(zip(names, contents, strict=True)), options.weights)


def _convert_adapter(saved, name: str, to: str, options: Options) -> targets.Place:
    if options.task is not None:
        saved = single_task.of_task(saved, options.task, name)
    place = targets.target(to, formats.PEFT)
    if place.kind not in (formats.PEFT, formats.ADAPTERS):
        why = f"the format {place.kind!r} cannot hold; --merge folds it into its backbone first"
        raise errors.UserError(f"{name} is an adapter, which {why}.")
    dtype = options.dtype or "float32"
    if place.is_adapter_folder:
        how = {"overwrite": options.overwrite, "dtype": dtype}
        # Where that is a run's folder, with answers to questions.
        adapter_folder.write(saved, place.path, run_folder=pathlib.Path(name), **how)
        return place
    targets.check_free(place, options.overwrite)
    with locations.created(place.path, replace=True) as partial:
        if place.kind == formats.PEFT:
            lines = adapters.write_checked(saved, partial, name, options.seed)
            print("\n".join(lines))
        else:
            saved_run.save(saved, partial, dtype)
            print(adapter_trees.check_same(saved, saved_run.load(partial), dtype))
    return place


def _merge(saved, name: str, to: str, options: Options) -> targets.Place:
    place = _target_of_model(to, None, "--merge makes", options)
    given = foreign.backbone_spec(options.base) if options.base else None
    spec = given or saved.description.get("backbone_spec", "")
    method = records.method(saved.description["method"], name)
    network = records.network(saved.description, name)
    # Rounding of activations would hide what rounding of kernels does.
    network = network.clone(config=dataclasses.replace(network.config, dtype="float32"))
    frozen_dtype = saved.description["backbone"].get("frozen_dtype", "float32")
    how = {"task": options.task, "frozen_dtype": frozen_dtype, "seed": options.seed}
    params, gap, record = merge.merge_saved(network, method, spec, saved, name, **how)
    print(f"logits of adapted and merged network on a random batch: {gap}")
    model = checkpoint_file.CheckpointFile(name, network.config, leaves.flatten(params))
    kind, _, folder = spec.partition(":")
    like = formats.open_backbone(folder) if kind == formats.HUGGING_FACE else None
    return _write_model(model, place, options, like, record)


def _convert_model(model, source: targets.Place, to: str, options: Options) -> targets.Place:
    given = {"merge": options.merge, "task": options.task is not None, "base": options.base}
    for name, is_given in given.items():
        if is_given:
            raise errors.UserError(f"{source} is a whole model; --{name} is for adapters.")
    other = {formats.HUGGING_FACE: formats.T5X, formats.T5X: formats.HUGGING_FACE}
    place = _target_of_model(to, other.get(source.kind), f"{source} is", options)
    print(f"{source}: {t5_sizes.describe(model.config)}")
    like = model if model.settings else None
    return _write_model(model, place, options, like)


def _target_of_model(to: str, default: str | None, subject: str, options) -> targets.Place:
    place = targets.target(to, default)
    if place.kind == formats.PEFT:
        raise errors.UserError(f"{subject} a whole model, which PEFT's format cannot hold.")
    if place.is_adapter_folder:
        what = "a whole model, which is a file *.safetensors in our own format"
        raise errors.UserError(f"{subject} {what}.")
    targets.check_free(place, options.overwrite)
    return place


def _write_model(model, place, options: Options, like, record=None) -> targets.Place:
    if options.scan_layers is not None and place.kind != formats.HUGGING_FACE:
        model = model.scanned(options.scan_layers)
    started = time.monotonic()
    with locations.created(place.path, replace=True) as partial:
        what = model, options.dtype, record, like, options.t5x_layout
        models.write(place.kind, partial, *what)
        seconds = time.monotonic() - started
        size = sum(leaf.nbytes for leaf in model.leaves.values()) / 1e6
        print(f"{size:.0f} MB in {seconds:.1f} s, {size / max(seconds, 1e-3):.0f} MB/s")
        written = formats.open_backbone(partial, place.kind)
        gap = models.check_written(model, written, options.dtype, options.seed)
        print(f"read again: all {len(model.leaves)} leaves are the same, bit by bit")
        print(f"logits before and after on a random batch: {gap or 'left out, the model is large'}")
    return place
