"""Whole models of any format: opened, written, and compared after they were written."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax

from moe_peft import errors
from moe_peft.convert import targets
from moe_peft.models import encoder_decoder, t5
from moe_peft.weights import (
    backbone,
    checkpoint_file,
    formats,
    hugging_face,
    leaves,
    merging,
    records,
    safetensors_files,
    saved_run,
    t5_sizes,
    t5x_files,
)

LOGITS_BYTES = 2_000_000_000  # of two models in float32, beyond which logits take too much memory


def open_file(path: pathlib.Path) -> checkpoint_file.Opened:
    """Returns a model in our own format; only the header is read."""
    found = safetensors_files.open_file(path)
    shapes = {name: leaf.shape for name, leaf in found.items()}
    description = backbone.read_metadata(path)
    if description.get("model"):
        config = records.network(description, str(path)).config
    else:
        config = t5_sizes.recognise(shapes, str(path))
    return checkpoint_file.Opened(str(path), config, found)


def open_saved(saved: saved_run.Saved, where: str) -> checkpoint_file.Opened:
    """Returns the model of a run that trained all of it."""
    config = records.network(saved.description, where).config
    return checkpoint_file.Opened(where, config, leaves.flatten(saved.trainable))


def open_place(place: targets.Place) -> checkpoint_file.Opened:
    """Returns the model at a place of the format "hf", "t5x" or "ours"."""
    if place.kind == formats.ADAPTERS:
        return open_file(place.path)
    return formats.open_backbone(place.path, place.kind)


def write(
    kind: str,
    path: pathlib.Path,
    model: checkpoint_file.Opened,
    dtype: str | None,
    *,
    metadata: Mapping[str, Any] | None = None,
    like: checkpoint_file.Opened | None = None,
    layout: str = "legacy",
) -> None:
    """Writes a model, leaf by leaf.

    Args:
      kind: "hf", "t5x" or "ours".
      path: must not exist.
      model: in the layout, scanned or not, in which it is written.
      dtype: "float32", "bfloat16", or None for each leaf's own.
      metadata: of a file in our format, besides its network.
      like: a Hugging Face model whose tokenizer and settings go along.
      layout: of a T5X checkpoint, see `t5x.write`.
    """
    model.report().check()
    if kind == formats.HUGGING_FACE:
        settings = like.settings if like else None
        folder = like.path if like else None
        hugging_face.write(
            path, model.config, model.leaves, dtype=dtype, settings=settings, copy_from=folder
        )
    elif kind == formats.T5X:
        t5x_files.write(path, model.config, model.leaves, dtype=dtype, layout=layout)
    else:
        network = {"class": "Transformer", "config": dataclasses.asdict(model.config)}
        record = json.dumps({**(metadata or {}), "model": network}, sort_keys=True)
        stored = {name: leaves.stored_as(leaf, dtype) for name, leaf in model.leaves.items()}
        header = {"format": "np", "moe_peft": record}
        safetensors_files.write_file(path, stored, header)


def check_written(
    model: checkpoint_file.Opened, written: checkpoint_file.Opened, dtype: str | None, seed: int = 0
) -> merging.Gap | None:
    """Compares every value of two models, and their logits on a random batch.

    Returns:
      The gap between logits; None for models too large for that.

    Raises:
      UserError: a leaf is missing, left over, or not what it was before it was cast to `dtype`.
    """
    written = written.scanned(model.config.scan_layers)
    odd = sorted(model.leaves.keys() ^ written.leaves.keys())
    if odd:
        raise errors.UserError(f"{written.path}: {odd[0]} was not converted; nothing was kept.")
    for path, leaf in model.leaves.items():
        want, have = leaves.cast(leaf.read(), dtype), written.leaves[path].read()
        if want.dtype != have.dtype or want.tobytes() != have.tobytes():
            raise errors.UserError(f"{written.path}: {path} changed; nothing was kept.")
    if 2 * sum(4 * leaf.nbytes // leaf.dtype.itemsize for leaf in model.leaves.values()) > (
        LOGITS_BYTES
    ):
        return None
    network = t5.Transformer(dataclasses.replace(model.config, dtype="float32"))
    logits = jax.jit(encoder_decoder.EncoderDecoder(network).logits)
    batch = merging.random_batch(model.config.vocab_size, seed)
    before, after = (logits(leaves.load(m.leaves, "float32"), batch) for m in (model, written))
    return merging.gap(before, after)
