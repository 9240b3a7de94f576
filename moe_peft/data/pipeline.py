"""Batches for training, from any task or mixture; the door to the rest of `data`.

Tasks whose rows are in memory, or mapped into it, are read row by row: the example at any place of
the stream is a pure function of the seed and the place, so a run resumes exactly where it stopped,
at once. Everything else goes through `seqio.get_dataset`, where resuming skips what was read.
"""

from collections.abc import Iterator, Mapping
import itertools
import logging

from moe_peft import errors
from moe_peft.data import (
    encoding,
    lookup,
    mixing,
    packing,
    sentences,
    task_ids,
)
from moe_peft.data.encoding import Batch
from moe_peft.data.evaluation_data import EvalBatch, Example, eval_examples
from moe_peft.data.lookup import check_vocabulary, get, tasks_of, vocabulary
from moe_peft.models import special_ids

__all__ = ["Batch", "EvalBatch", "Example", "check_vocabulary", "eval_examples", "get"]
__all__ += ["rates", "stream_of", "tasks_of", "train_batches", "vocabulary"]


def train_batches(
    mixture_or_task: lookup.Mixture,
    batch_size: int,
    feature_lengths: Mapping[str, int],
    seed: int,
    pack: bool = False,
    start_batch: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    split: str = "train",
    sentence_encoder: sentences.Encoder | None = None,
    ids: special_ids.SpecialIds | None = None,
) -> Iterator[Batch]:
    """Endless batches; the same arguments give the same batches on every machine.

    Args:
      mixture_or_task: a registered name, or `files.Files`.
      batch_size: rows of the whole batch, over all shards.
      feature_lengths: {"inputs": tokens, "targets": tokens}, end mark included. Longer examples are
        cut from the right, with a warning; when packing, the capacity of a row.
      seed: of the order and of the mixing.
      pack: fill rows with several examples. Packed rows mix tasks, so they carry no task ids.
      start_batch: batches to leave out: the continuation of a run that consumed that many.
      shard_index: which part of each batch this host gets, of `shard_count` parts.
      shard_count: number of hosts.
      split: of the tasks.
      sentence_encoder: adds `sentence_embeddings`; by default `sentences.configured`.
      ids: of the network; None: as the vocabulary tells.
    """
    ids = lookup.special_ids_of(mixture_or_task) if ids is None else ids
    lengths = lookup.check_lengths(feature_lengths)
    if batch_size < 1 or shard_count < 1 or batch_size % shard_count:
        raise errors.UserError(
            f"A batch of {batch_size} does not divide among {shard_count} hosts; "
            "choose a batch size that is a multiple of the host count."
        )
    errors.check_between("shard_index", shard_index, 0, shard_count - 1)
    errors.check_at_least("start_batch", start_batch, 0)
    size = batch_size // shard_count
    own = slice(shard_index * size, (shard_index + 1) * size)
    if (stream := stream_of(mixture_or_task, split, seed)) is not None:
        for task, source in zip(lookup.tasks_with(mixture_or_task, split), stream.sources):
            encoding.warn_if_cut(task.name, source, lengths)
        make = packed if pack else padded
        batches = make(stream, batch_size, lengths, start_batch, own, ids)
    else:
        _check_streamed(mixture_or_task, ids)
        whole = _streamed(mixture_or_task, batch_size, lengths, seed, pack, start_batch, split)
        batches = ({name: value[own] for name, value in batch.items()} for batch in whole)
    batches = map(task_ids.per_template, batches)
    sentence_encoder = sentence_encoder or sentences.configured()
    if sentence_encoder is None:
        return batches
    words = vocabulary(mixture_or_task)
    return (sentences.add_embeddings(batch, words, sentence_encoder) for batch in batches)


def stream_of(mixture_or_task: lookup.Mixture, split: str, seed: int) -> mixing.Stream | None:
    """The examples in training order, of tasks in memory; None where a task is elsewhere."""
    tasks = lookup.tasks_with(mixture_or_task, split)
    if not all(hasattr(task.source, "rows") for task in tasks):
        return None
    sources = [task.source.rows(split) for task in tasks]
    return mixing.Stream(sources, rates(mixture_or_task, tasks), seed)


def rates(mixture_or_task: lookup.Mixture, tasks: list[lookup.Task]) -> list[float]:
    """Relative rates of a mixture's tasks."""
    provider = lookup.get(mixture_or_task)
    if not hasattr(provider, "get_rate"):  # a task
        return [1.0]
    return [float(provider.get_rate(task)) for task in tasks]


def padded(
    stream: mixing.Stream,
    batch_size: int,
    lengths: tuple[int, int],
    start_batch: int,
    own: slice = slice(None),
    ids: special_ids.SpecialIds = special_ids.T5,
) -> Iterator[Batch]:
    """Batches of one example a row of `lengths` (inputs, targets) tokens, from `start_batch` on.

    `own` are the rows of each whole batch that are wanted; no others are read.
    """
    places = stream.places(start_batch * batch_size)
    while True:
        # All places are drawn, so that every host counts the same examples.
        chosen = list(itertools.islice(places, batch_size))[own]
        examples = [(stream.sources[task], index) for task, index in chosen]
        yield encoding.encode(examples, lengths, ids=ids)


def packed(
    stream: mixing.Stream,
    batch_size: int,
    lengths: tuple[int, int],
    start_batch: int,
    own: slice = slice(None),
    ids: special_ids.SpecialIds = special_ids.T5,
) -> Iterator[Batch]:
    """Batches of rows filled with several examples, otherwise as `padded`."""
    packer = packing.Packer(batch_size, lengths)
    measure, places = stream.places(0), stream.places(0)
    wanted = range(batch_size)[own]

    def token_counts():
        for task, index in measure:
            yield tuple(
                min(int(stream.lengths[task][name][index]) + 1, limit)
                for name, limit in zip(encoding.FEATURES, lengths)
            )

    # Packing depends on all lengths before; replaying them is cheap, reading the rows is not.
    for number, assigned in enumerate(packer.batches(token_counts())):
        chosen = list(itertools.islice(places, len(assigned)))
        if number >= start_batch:
            kept = [(place, row) for place, row in zip(chosen, assigned) if row in wanted]
            examples = [(stream.sources[task], index) for (task, index), _ in kept]
            in_part = [row - wanted.start for _, row in kept]
            yield encoding.encode(examples, lengths, in_part, len(wanted), ids)


def _check_streamed(name: lookup.Mixture, ids: special_ids.SpecialIds) -> None:
    if (ids.pad, ids.start) != (0, 0):
        raise errors.UserError(
            f"{name!r} is read by SeqIO, which pads and starts with the id 0; the model has {ids}. "
            "Train on files of rows instead (--data)."
        )


def _streamed(name, batch_size, lengths, seed, pack, start_batch, split) -> Iterator[Batch]:
    """Any other SeqIO task, through tf.data; arguments as of `train_batches`."""
    import seqio

    from moe_peft.data import feature_converter

    features = lookup.get(name).output_features
    if set(feature_converter.ROUTING_FEATURES) <= set(features) and not pack:
        converter = feature_converter.RoutingEncDecFeatureConverter()
    else:
        converter = seqio.EncDecFeatureConverter(pack=pack)
    dataset = seqio.get_dataset(
        name,
        dict(zip(encoding.FEATURES, lengths)),
        converter,
        dataset_split=split,
        shuffle=True,
        num_epochs=None,
        seed=seed,
        verbose=False,
    )
    if start_batch:
        logging.info("Skipping %d batches of %s to resume.", start_batch, name)
    dataset = dataset.batch(batch_size, drop_remainder=True).skip(start_batch)
    yield from dataset.as_numpy_iterator()
