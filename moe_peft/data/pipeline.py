"""Batches for training and evaluation, from any SeqIO task or mixture.

Tasks over `rows.RowsSource` are read from memory: the example at any place of the stream is a pure
function of the seed and the place, so a run resumes exactly where it stopped, at once. Everything
else goes through `seqio.get_dataset`, where resuming skips what was read.
"""

from collections.abc import Iterator, Mapping
import itertools
import logging

import numpy as np
import seqio

from moe_peft import errors
from moe_peft.data import feature_converter, mixing, packing, rows

Batch = dict[str, np.ndarray]
FEATURES = ("inputs", "targets")


def get(name: str) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name; a UserError with near names if there is none."""
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise errors.UserError(
            f"No task or mixture is called {name!r}.{errors.near(name, known)} "
            "Import the module that registers it (for the CLDR suite, moe_peft.tasks.cldr)."
        )
    return seqio.get_mixture_or_task(name)


def tasks_of(name: str) -> list[seqio.Task]:
    """The tasks of a mixture, or the task itself, in order."""
    return list(seqio.get_subtasks(get(name)))


def num_tasks(name: str) -> int:
    """How many tasks a mixture has."""
    return len(tasks_of(name))


def vocabulary(name: str) -> seqio.Vocabulary:
    """The vocabulary of inputs and targets; they must agree."""
    features = get(name).output_features
    found = features["targets"].vocabulary
    if features["inputs"].vocabulary != found:
        raise errors.UserError(f"{name!r} uses different vocabularies for inputs and targets.")
    return found


def check_vocabulary(name: str, vocab_size: int) -> None:
    """Refuses a mixture whose ids the model has no embedding for."""
    needed = vocabulary(name).vocab_size
    if needed > vocab_size:
        raise errors.UserError(
            f"{name!r} has token ids up to {needed - 1}, the model's vocab_size is {vocab_size}: "
            f"the backbone was trained with another vocabulary than the tasks."
        )


def train_batches(
    mixture_or_task: str,
    batch_size: int,
    feature_lengths: Mapping[str, int],
    seed: int,
    pack: bool = False,
    start_batch: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    split: str = "train",
) -> Iterator[Batch]:
    """Endless batches; the same arguments give the same batches on every machine.

    Args:
      mixture_or_task: a registered name.
      batch_size: rows of the whole batch, over all shards.
      feature_lengths: {"inputs": tokens, "targets": tokens}, end mark included. Longer examples are
        cut from the right, with a warning; when packing, the capacity of a row.
      seed: of the order and of the mixing.
      pack: fill rows with several examples. Packed rows mix tasks, so they carry no task ids.
      start_batch: batches to leave out: the continuation of a run that consumed that many.
      shard_index: which part of each batch this host gets; the parts joined are the unsharded
        batch.
      shard_count: number of hosts.
      split: of the tasks.
    """
    lengths = check_lengths(feature_lengths)
    if batch_size < 1 or shard_count < 1 or batch_size % shard_count:
        raise errors.UserError(
            f"A batch of {batch_size} does not divide among {shard_count} hosts; "
            "choose a batch size that is a multiple of the host count."
        )
    if not 0 <= shard_index < shard_count:
        raise errors.UserError(f"shard_index {shard_index} is outside 0..{shard_count - 1}.")
    if start_batch < 0:
        raise errors.UserError(f"start_batch is {start_batch}; expected 0 or more.")
    tasks = tasks_with(mixture_or_task, split)
    if all(isinstance(task.source, rows.RowsSource) for task in tasks):
        stream = mixing.Stream(
            [task.source.rows(split) for task in tasks], _rates(mixture_or_task, tasks), seed
        )
        make = _packed if pack else _padded
        batches = make(stream, batch_size, lengths, start_batch)
    else:
        batches = _streamed(mixture_or_task, batch_size, lengths, seed, pack, start_batch, split)
    part = slice(
        shard_index * batch_size // shard_count, (shard_index + 1) * batch_size // shard_count
    )
    return ({name: value[part] for name, value in batch.items()} for batch in batches)


def check_lengths(feature_lengths: Mapping[str, int]) -> tuple[int, int]:
    """(inputs, targets) tokens of a row."""
    if set(feature_lengths) != set(FEATURES) or any(
        not isinstance(length, int) or length < 2 for length in feature_lengths.values()
    ):
        raise errors.UserError(
            f"feature_lengths is {dict(feature_lengths)}; expected whole numbers of at least 2 for "
            "'inputs' and 'targets', for example {'inputs': 56, 'targets': 28}."
        )
    return feature_lengths["inputs"], feature_lengths["targets"]


def tasks_with(mixture_or_task: str, split: str) -> list[seqio.Task]:
    """Tasks of a mixture that have a split, none of them empty."""
    tasks = tasks_of(mixture_or_task)
    found = [task for task in tasks if split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        raise errors.UserError(
            f"{mixture_or_task!r} has no split {split!r}; it has {', '.join(splits) or 'none'}."
            f"{errors.near(split, splits)}"
        )
    for task in found:
        if task.num_input_examples(split) == 0:
            raise errors.UserError(f"Task {task.name!r} has no examples in its {split!r} split.")
    return found


def _rates(mixture_or_task: str, tasks: list[seqio.Task]) -> list[float]:
    provider = get(mixture_or_task)
    if isinstance(provider, seqio.Task):
        return [1.0]
    return [float(provider.get_rate(task)) for task in tasks]


def _with_end(sequence: np.ndarray, limit: int) -> np.ndarray:
    """The ids with the end mark 1, cut to the limit as SeqIO cuts: the mark survives."""
    return np.append(sequence[: limit - 1], 1)


def encode_rows(examples: list[tuple[rows.Rows, int]], lengths: tuple[int, int]) -> Batch:
    """One example a row, padded."""
    places = list(range(len(examples)))
    encoder, decoder = (
        packing.fill(
            [_with_end(getattr(source, name)[index], limit) for source, index in examples],
            places,
            (len(examples), limit),
        )
        for name, limit in zip(FEATURES, lengths)
    )
    batch = _model_features(encoder, decoder)
    for name in examples[0][0].scalars:
        batch[name] = np.array([source.scalars[name][i] for source, i in examples], np.int32)
    return batch


def _model_features(encoder: Batch, decoder: Batch) -> Batch:
    return {
        "encoder_input_tokens": encoder["tokens"],
        "decoder_target_tokens": decoder["tokens"],
        "decoder_input_tokens": packing.shift_right(decoder["tokens"], decoder["segment_ids"]),
        "decoder_loss_weights": (decoder["tokens"] > 0).astype(np.int32),
    }


def _padded(
    stream: mixing.Stream, batch_size: int, lengths: tuple[int, int], start_batch: int
) -> Iterator[Batch]:
    places = stream.places(start_batch * batch_size)
    while True:
        chosen = list(itertools.islice(places, batch_size))
        yield encode_rows([(stream.sources[task], index) for task, index in chosen], lengths)


def _packed(
    stream: mixing.Stream, batch_size: int, lengths: tuple[int, int], start_batch: int
) -> Iterator[Batch]:
    packer = packing.Packer(batch_size, lengths)
    measure, places = stream.places(0), stream.places(0)

    def token_counts():
        for task, index in measure:
            yield tuple(
                min(int(stream.lengths[task][name][index]) + 1, limit)
                for name, limit in zip(FEATURES, lengths)
            )

    for number, assigned in enumerate(packer.batches(token_counts())):
        chosen = list(itertools.islice(places, len(assigned)))
        if number < start_batch:
            continue
        encoder, decoder = (
            packing.fill(
                [_with_end(getattr(stream.sources[t], name)[i], limit) for t, i in chosen],
                assigned,
                (batch_size, limit),
            )
            for name, limit in zip(FEATURES, lengths)
        )
        yield {
            **_model_features(encoder, decoder),
            "encoder_segment_ids": encoder["segment_ids"],
            "decoder_segment_ids": decoder["segment_ids"],
            "encoder_positions": encoder["positions"],
            "decoder_positions": decoder["positions"],
        }


def _streamed(
    mixture_or_task: str,
    batch_size: int,
    lengths: tuple[int, int],
    seed: int,
    pack: bool,
    start_batch: int,
    split: str,
) -> Iterator[Batch]:
    """Any other SeqIO task, through tf.data."""
    routed = set(feature_converter.ROUTING_FEATURES) <= set(get(mixture_or_task).output_features)
    if routed and not pack:
        converter = feature_converter.RoutingEncDecFeatureConverter()
    else:
        converter = seqio.EncDecFeatureConverter(pack=pack)
    dataset = seqio.get_dataset(
        mixture_or_task,
        dict(zip(FEATURES, lengths)),
        converter,
        dataset_split=split,
        shuffle=True,
        num_epochs=None,
        seed=seed,
        verbose=False,
    )
    if start_batch:
        logging.info("Skipping %d batches of %s to resume.", start_batch, mixture_or_task)
    dataset = dataset.batch(batch_size, drop_remainder=True).skip(start_batch)
    yield from dataset.as_numpy_iterator()
