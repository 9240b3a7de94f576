"""What a run says of itself: at its start what it will do, at its end what to do next."""

from collections.abc import Mapping
import functools
import os
import sys
from typing import Any

import jax

from moe_peft.data import pipeline
from moe_peft.models import family
from moe_peft.runtime import processes
from moe_peft.runtime import progress as progress_lib


def introduce(settings: Any, mesh: jax.sharding.Mesh, num_trainable: int, num_base: int) -> None:
    """Prints what a run is, before its weights are read; `settings` are those of `train`."""
    if not processes.is_first():
        return
    config = getattr(settings.model, "config", None)
    is_known = isinstance(config, tuple(each.config for each in family.FAMILIES.values()))
    network = family.of(config).describe(config) if is_known else type(settings.model).__name__
    lengths = settings.feature_lengths
    kind = jax.devices()[0].device_kind
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    lines = {
        "backbone": f"{settings.backbone} ({network})",
        "method": f"{settings.method.name}, {num_trainable:,} trainable parameters, "
        f"{100 * num_trainable / num_base:.3g} % of the network's {num_base:,}",
        "data": f"{_rows(settings)}; {lengths['inputs']} tokens of inputs, "
        f"{lengths['targets']} of targets",
        "steps": f"{settings.num_steps:,} of {settings.batch_size} rows; "
        f"{settings.optimizer.name}, learning rate {_rates(settings)}",
        "devices": f"{mesh.size} x {kind}{f' ({axes})' if axes else ''}, activations in "
        f"{getattr(config, 'dtype', '?')}, frozen weights in {settings.frozen_dtype}",
        "writes to": str(settings.model_dir),
    }
    for name, text in lines.items():
        print(f"{name:10} {text}", file=sys.stderr, flush=True)
    if num_unspelled := getattr(settings.mixture, "num_unspelled", int)():
        print(
            f"WARNING: {num_unspelled:,} of the answers have characters that the vocabulary does "
            "not know; they cannot be learned to the letter.",
            file=sys.stderr,
        )


def conclude(settings: Any, metrics: Mapping[str, float], seconds: float) -> None:
    """Prints where the result is, and the commands that come next."""
    if not processes.is_first():
        return
    folder = _short(settings.model_dir)
    exported = f"{folder}.safetensors" if settings.method.name == "full" else f"{folder}_adapter"
    loss = f", loss {metrics['loss']:.4f} in the last steps" if "loss" in metrics else ""
    print(
        f"trained {settings.num_steps:,} steps{loss}, in {progress_lib.duration(seconds)}; the "
        f"result is in {folder}\nnext:\n"
        f"  moe-peft eval {folder}\n"
        f"  moe-peft infer {folder} --inputs questions.jsonl --outputs answers.jsonl\n"
        f"  moe-peft export {folder} --to {exported}",
        file=sys.stderr,
    )


def _rows(settings: Any) -> str:
    stream = pipeline.stream_of(settings.mixture, "train", settings.seed)
    if stream is None:
        return f"{settings.mixture}"
    count = sum(map(len, stream.sources))
    passes = settings.num_steps * settings.batch_size / max(count, 1)
    mixture = settings.mixture
    name = mixture if isinstance(mixture, str) else mixture.title
    text = f"{name}, {count:,} training rows ({passes:.3g} passes)"
    if len(stream.sources) > 1:
        text += f" of {len(stream.sources)} tasks"
    if getattr(settings.mixture, "is_held_out", False):
        count = len(settings.mixture.stored("validation"))
        text += f", {count:,} others kept apart for evaluation"
    return text


def _rates(settings: Any) -> str:
    """The highest learning rate of each group."""
    peak = functools.partial(settings.optimizer.peak, settings.num_steps)
    groups = [f", {peak(name):g} for {name}" for name in sorted(settings.optimizer.groups)]
    return f"at most {peak(''):g}{''.join(groups)}"


def _short(path: Any) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
