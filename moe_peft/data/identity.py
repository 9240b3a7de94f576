"""What shapes the rows of a run, as json types, so that a run cannot go on with other data.

Mixture, lengths, batch size, packing and seed are arguments of a run, and described there. Here are
the gin settings that data code reads by itself, and what came of them.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import itertools
import json
from typing import Any

import gin
import numpy as np

from moe_peft.data import (
    bad_rows,
    lookup,
    mixing,
    pipeline,
    rows,
    sentences,
    task_ids,
    vocabularies,
)

NUM_BATCHES = 2


def describe(
    mixture_or_task: lookup.Mixture,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    pack: bool = False,
    split: str = "train",
) -> dict[str, Any]:
    """Describes the rows that `pipeline.train_batches` gives for the same arguments.

    Paths and hosts do not count: the same files elsewhere give the same description.

    Returns:
      "gin": values by the full name of their parameter; "seen": how many tasks, rows and tokens
      there are (of tasks in memory), and a digest of the first `NUM_BATCHES` batches as the model
      sees them. Sentence embeddings are left out: they differ in their last bits by machine.
    """
    lengths = lookup.check_lengths(feature_lengths)
    stream = pipeline.stream_of(mixture_or_task, split, seed)
    if stream is None:
        arguments = (mixture_or_task, batch_size, feature_lengths, seed, pack)
        batches = pipeline.train_batches(*arguments, split=split)
    else:
        make = pipeline.packed if pack else pipeline.padded
        ids = lookup.special_ids_of(mixture_or_task)
        batches = map(task_ids.per_template, make(stream, batch_size, lengths, 0, ids=ids))
    seen = {} if stream is None else _count(stream)
    seen["first_batches"] = _digest(itertools.islice(batches, NUM_BATCHES))
    return {"gin": settings_of(lookup.tasks_with(mixture_or_task, split)), "seen": seen}


def settings_of(tasks: Iterable[lookup.Task]) -> dict[str, Any]:
    """The settings in force of every configurable that some task, or the pipeline, reads."""
    encoder = sentences.configured()
    found = {
        "sentences.configured.encoder": encoder and getattr(encoder, "__name__", repr(encoder)),
        "task_ids.per_template.num_templates": _bound("task_ids.per_template.num_templates"),
    }
    sources = (task.source for task in tasks)
    own = {of.settings for of in sources if hasattr(of, "settings")}
    if own:
        found["bad_rows.configured.action"] = "skip" if bad_rows.is_skipping() else "stop"
    for settings in (read() for read in own):
        name = vocabularies.fingerprint(getattr(settings, "vocabulary", None))
        found["vocabularies.configured.vocabulary"] = name
        module = type(settings).__module__.rpartition(".")[2]
        for field in dataclasses.fields(settings):
            if field.metadata != rows.PATH:
                value = getattr(settings, field.name)
                found[f"{module}.configured.{field.name}"] = value
    return json.loads(json.dumps(found))


def _bound(name: str) -> Any:
    """What gin sets for a parameter, macros replaced; None where it is not set."""
    try:
        value = gin.query_parameter(name)
    except ValueError:
        return None
    return value.scoped_configurable_fn() if hasattr(value, "scoped_configurable_fn") else value


def _count(stream: mixing.Stream) -> dict[str, Any]:
    """Sizes in all, and a digest of those of every task, which other files rarely share."""
    tokens = lambda column: int(column.lengths.sum())
    sizes = [[len(of), tokens(of.inputs), tokens(of.targets)] for of in stream.sources]
    total = dict(zip(("rows", "input_tokens", "target_tokens"), np.sum(sizes, axis=0).tolist()))
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
    return {"tasks": len(sizes), **total, "sizes": digest}


def _digest(batches: itertools.islice) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if name != "sentence_embeddings":
                value = np.ascontiguousarray(value)
                digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
                digest.update(value.data)
    return digest.hexdigest()[:16]
