"""Whole models of any format: written, and compared after they were written."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.weights import (
    checkpoint_file,
    formats,
    hugging_face,
    identity,
    leaves,
    merging,
    safetensors_files,
    t5x_files,
)

LOGITS_BYTES = 2_000_000_000  # of two models in float32, beyond which logits take too much memory


def write(
    kind: str,
    path: pathlib.Path,
    model: checkpoint_file.CheckpointFile,
    dtype: str | None,
    metadata: Mapping[str, Any] | None,
    like: checkpoint_file.CheckpointFile | None,
    t5x_layout: str,
) -> None:
    """Writes a model as "hf", "t5x" or "ours", leaf by leaf, in the layout of layers that it has.

    Nothing may be at the path; `dtype` None keeps each leaf's own. A file in our format also gets
    `metadata`, one for Hugging Face the tokenizer and settings of the model `like`.
    """
    model.report().check()
    if kind == formats.HUGGING_FACE:
        more = {"settings": like.settings, "copy_from": like.path} if like else {}
        hugging_face.write(path, model.config, model.leaves, dtype=dtype, **more)
    elif kind == formats.T5X:
        t5x_files.write(path, model.config, model.leaves, dtype=dtype, layout=t5x_layout)
    else:
        network = {"class": "Transformer", "config": identity.describe_config(model.config)}
        # For the way back, which then says what the source did.
        told = {"hugging_face": dict(like.settings)} if like and like.settings else {}
        record = {**(metadata or {}), "model": network, **told}
        safetensors_files.save_tree(model.leaves, path, dtype, record)


def check_written(
    model: checkpoint_file.CheckpointFile,
    written: checkpoint_file.CheckpointFile,
    dtype: str | None,
    seed: int = 0,
) -> merging.Gap | None:
    """Returns the gap between two models' logits on a random batch; None if they are too large.

    Raises UserError if a leaf is missing, left over, or not what it was, cast to `dtype`.
    """
    written = written.scanned(model.config.scan_layers)
    for path in sorted(model.leaves.keys() ^ written.leaves.keys()):
        raise errors.UserError(f"{written.path}: {path} was not converted; nothing was kept.")
    for path, leaf in model.leaves.items():
        want, have = leaves.cast(leaf.read(), dtype), written.leaves[path].read()
        if want.dtype != have.dtype or want.tobytes() != have.tobytes():
            raise errors.UserError(f"{written.path}: {path} changed; nothing was kept.")
    num_values = sum(leaf.nbytes // leaf.dtype.itemsize for leaf in model.leaves.values())
    if 2 * 4 * num_values > LOGITS_BYTES:
        return None
    network = t5.Transformer(dataclasses.replace(model.config, dtype="float32"))
    logits = merging.plain_logits(network)
    batch = merging.random_batch(model.config.vocab_size, seed)
    before, after = (logits(leaves.load(m.leaves, "float32"), batch) for m in (model, written))
    return merging.gap(before, after)
