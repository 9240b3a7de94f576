"""`convert`: backbones and adapters from one format into another, verified before they appear."""

from collections.abc import Sequence
import dataclasses
import time

import jax
import numpy as np

from moe_peft import errors, patching
from moe_peft.convert import averaging, merged, models, single_task, targets
from moe_peft.convert.peft import adapters
from moe_peft.weights import (
    backbone,
    checkpoint_file,
    exported,
    formats,
    records,
    saved_run,
    t5_sizes,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be asked of a conversion.

    Attributes:
      base: backbone of an adapter, such as "hf:FOLDER"; None takes the one its run names.
      merge: fold the adapter into its backbone.
      task: id of the task for which a task-routed adapter is merged, or taken alone.
      member: which run of an adaptation, "TASK:SEED".
      step: which checkpoint of a run; None for the newest.
      weights: of an average; None for equal ones.
      dtype: "float32" or "bfloat16"; None keeps a model's own, adapters are float32.
      scan_layers: layout of a model's leaves; None keeps it. Hugging Face has one layout.
      t5x_layout: "legacy" or "orbax".
      overwrite: replace what is there, if it is of the same format.
      seed: of the random batch.
    """

    base: str | None = None
    merge: bool = False
    task: int | None = None
    member: str | None = None
    step: int | None = None
    weights: Sequence[float] | None = None
    dtype: str | None = None
    scan_layers: bool | None = None
    t5x_layout: str = "legacy"
    overwrite: bool = False
    seed: int = 0


def convert(sources: Sequence[str], to: str, options: Options) -> targets.Place:
    """Writes what `sources` name to `to`, and returns where that is.

    One source is converted; several are averaged. What was written is read again and compared
    before it gets its name: adapters layer by layer, models leaf by leaf and by their logits.

    Args:
      sources: "PATH" or "FORMAT:PATH" each.
      to: "FORMAT:FOLDER", "FILE.safetensors" or, where there is only one choice, "FOLDER".
      options: see `Options`.

    Raises:
      UserError: something is not there, cannot be read or cannot be expressed; nothing is written.
    """
    found = [targets.source(spec) for spec in sources]
    contents = [_open(place, options) for place in found]
    names = [str(place) for place in found]
    if len(contents) > 1:
        name, content = " and ".join(names), _average(names, contents, options)
    else:
        (name,), (content,) = names, contents
    if isinstance(content, saved_run.Saved) and _trains_all(content):
        content = models.open_saved(content, name)
    if isinstance(content, checkpoint_file.Opened):
        return _convert_model(content, found[0], to, options)
    if options.merge:
        return _merge(content, name, to, options)
    return _convert_adapter(content, name, to, options)


def _open(place: targets.Place, options: Options) -> saved_run.Saved | checkpoint_file.Opened:
    if place.kind == targets.RUN:
        return exported.load(place.path, options.step, options.member)
    for name in ("member", "step"):
        if getattr(options, name) is not None:
            raise errors.UserError(f"{place} is no folder of runs, so it has no --{name}.")
    if place.kind == formats.PEFT:
        saved = adapters.read(place.path, _base(options.base) if options.base else None)
        for line in saved.description.get("gin", ()):
            print(line)
        return saved
    is_adapter = place.kind == formats.ADAPTERS and exported.holds_adapter(place.path)
    return exported.load(place.path) if is_adapter else models.open_place(place)


def _trains_all(saved: saved_run.Saved) -> bool:
    return saved.description["method"]["name"] == "full"


def _average(names, contents, options: Options) -> saved_run.Saved:
    for name, content in zip(names, contents, strict=True):
        if not isinstance(content, saved_run.Saved):
            raise errors.UserError(f"{name} is no adapter; --average takes adapters.")
    if len(set(names)) < len(names):
        raise errors.UserError(f"--average names {', '.join(names)}: one of them twice.")
    return averaging.average(dict(zip(names, contents, strict=True)), options.weights)


def _base(spec: str) -> adapters.Base:
    """Returns the model that `--base` names, with the fingerprint of its weights."""
    place = targets.source(spec)
    if place.kind in (targets.RUN, formats.PEFT):
        raise errors.UserError(f"--base {spec} is in the format {place.kind!r}, no whole model.")
    config = models.open_place(place).config
    shapes = {
        path: jax.ShapeDtypeStruct(shape, "float32")
        for path, shape in t5_sizes.of_config(config).items()
    }
    spec = _backbone_spec(spec)
    loaded = backbone.load(spec, patching.trees.unflatten(shapes), None)
    return adapters.Base(spec, config, loaded.fingerprint)


def _backbone_spec(base: str) -> str:
    """Returns `--base` as gin's BACKBONE has it: with a prefix."""
    if base.partition(":")[0] in {kind.partition(":")[0] for kind in backbone.KINDS}:
        return base
    place = targets.source(base)
    kind = {formats.ADAPTERS: "file"}.get(place.kind, place.kind)
    return f"{kind}:{place}"


def _convert_adapter(saved, name: str, to: str, options: Options) -> targets.Place:
    if options.task is not None:
        saved = single_task.of(saved, options.task, name)
    place = targets.target(to, formats.PEFT)
    if place.kind not in (formats.PEFT, formats.ADAPTERS):
        raise errors.UserError(
            f"{name} is an adapter, which the format {place.kind!r} cannot hold; --merge folds it "
            "into its backbone first."
        )
    targets.check_free(place, options.overwrite)
    with targets.placed(place) as partial:
        if place.kind == formats.PEFT:
            adapters.write(saved, partial, name)
            gap = adapters.gap(saved, partial, options.seed)
            print(f"every adapted layer on random inputs, ours and PEFT's formula: {gap}")
            if not gap.relative < 1e-5:
                raise errors.UserError(f"{name}: the layers differ; nothing was written.")
        else:
            exported.save(saved, partial, options.dtype or "float32")
        _check_adapter(saved, partial, place.kind, options)
    return place


def _check_adapter(saved, partial, kind: str, options: Options) -> None:
    """Reads an adapter again and compares every value."""
    again = adapters.read(partial) if kind == formats.PEFT else exported.load(partial)
    want = backbone.cast(saved.trainable, options.dtype or "float32")
    want, have = patching.flatten(want), patching.flatten(again.trainable)
    same = {path: np.array_equal(want[path], have.get(path)) for path in want}
    print(f"read again: {sum(same.values())} of {len(want)} leaves are the same, bit by bit")
    # A scale that PEFT has no place for is multiplied into B: rounding.
    odd = [p for p in want if not same[p] and not np.allclose(want[p], have[p], rtol=1e-6, atol=0)]
    if odd:
        raise errors.UserError(f"{odd[0]} is not what was to be written; nothing was kept.")


def _merge(saved, name: str, to: str, options: Options) -> targets.Place:
    place = targets.target(to, None)
    if place.kind == formats.PEFT:
        raise errors.UserError("--merge makes a whole model, which PEFT's format cannot hold.")
    targets.check_free(place, options.overwrite)
    spec = saved.description.get("backbone_spec", "")
    spec = _backbone_spec(options.base) if options.base else spec
    method = records.method(saved.description["method"], name)
    network = records.network(saved.description, name)
    network = network.clone(config=dataclasses.replace(network.config, dtype="float32"))
    frozen_dtype = saved.description["backbone"].get("frozen_dtype", "float32")
    result = merged.merge(
        network,
        method,
        spec,
        saved,
        name,
        task=options.task,
        frozen_dtype=frozen_dtype,
        seed=options.seed,
    )
    print(f"logits of adapted and merged network on a random batch: {result.gap}")
    model = checkpoint_file.Opened(name, network.config, models.leaves.flatten(result.params))
    like = None
    if spec.startswith("hf:"):
        like = formats.open_backbone(spec.removeprefix("hf:"))
    return _write_model(model, place, options, like, result.record)


def _convert_model(model, source: targets.Place, to: str, options: Options) -> targets.Place:
    for name in ("merge", "task", "base"):
        if getattr(options, name):
            raise errors.UserError(f"{source} is a whole model; --{name} is for adapters.")
    other = {formats.HUGGING_FACE: formats.T5X, formats.T5X: formats.HUGGING_FACE}
    place = targets.target(to, other.get(source.kind))
    if place.kind == formats.PEFT:
        raise errors.UserError(f"{source} is a whole model, which PEFT's format cannot hold.")
    targets.check_free(place, options.overwrite)
    print(f"{source}: {t5_sizes.describe(model.config)}")
    like = model if source.kind == formats.HUGGING_FACE else None
    return _write_model(model, place, options, like)


def _write_model(model, place, options: Options, like, record=None) -> targets.Place:
    if options.scan_layers is not None and place.kind != formats.HUGGING_FACE:
        model = model.scanned(options.scan_layers)
    started = time.monotonic()
    with targets.placed(place) as partial:
        models.write(
            place.kind,
            partial,
            model,
            options.dtype,
            metadata=record,
            like=like,
            layout=options.t5x_layout,
        )
        seconds = time.monotonic() - started
        size = sum(leaf.nbytes for leaf in model.leaves.values()) / 1e6
        print(f"{size:.0f} MB in {seconds:.1f} s, {size / max(seconds, 1e-3):.0f} MB/s")
        written = models.open_place(targets.Place(place.kind, partial))
        gap = models.check_written(model, written, options.dtype, options.seed)
        print(f"read again: all {len(model.leaves)} leaves are the same, bit by bit")
        print(f"logits before and after on a random batch: {gap or 'left out, the model is large'}")
    return place
