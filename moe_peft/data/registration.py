"""SeqIO tasks over files that a user brings.

Registering reads nothing: a task's splits and rows, and the tasks of a mixture, are found when
somebody asks for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from moe_peft.data import files, row_store, seqio_vocabularies, vocabularies
from moe_peft.data import rows as rows_lib

_text = seqio.Feature(seqio_vocabularies.Configured(), add_eos=True)
_scalar = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0)
FEATURES = {"inputs": _text, "targets": _text, "task_ids": _scalar, "template_ids": _scalar}


@dataclasses.dataclass(frozen=True)
class TextExample:
    """A question and its answer, before they become ids."""

    inputs: str
    targets: str
    ending: str = ""  # a tail of `inputs` that stays when too long an input is cut
    references: tuple[str, ...] = ()  # every accepted answer; empty where it is `targets` alone


class RowsSource(seqio.DataSource):
    """A SeqIO source over `Rows`; tasks append the end mark and nothing else.

    `pipeline` reads its rows without SeqIO: mixing hundreds of small tasks in tf.data takes minutes
    to build. T5X gets them through SeqIO.
    """

    def __init__(self, rows: Callable[[str], rows_lib.Rows], sizes: Mapping[str, int]):
        self.rows = rows  # of a split by its name, loaded when asked for
        super().__init__(splits=tuple(sizes), num_input_examples=dict(sizes))

    supports_arbitrary_sharding = True  # rows are shared out one by one

    def list_shards(self, split: str) -> list[str]:
        """One name: there are no files."""
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
        """Rows in their own order; shuffling happens in the task's buffer."""
        del shuffle, seed
        rows = self.rows(split)

        def ragged(column: rows_lib.Ragged | rows_lib.Picked) -> tf.RaggedTensor:
            column = column.copied() if isinstance(column, rows_lib.Picked) else column
            flat = column.flat.astype(np.int32)
            return tf.RaggedTensor.from_row_limits(flat, column.ends, validate=False)

        columns = {"inputs": ragged(rows.inputs), "targets": ragged(rows.targets)}
        dataset = tf.data.Dataset.from_tensor_slices({**columns, **rows.scalars})
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset


class LazySource(RowsSource):
    """Rows in memory whose splits and sizes are known only once the files are read.

    `settings` gives the settings in force of a benchmark, a dataclass whose module and gin name
    agree; `reporting` is how the task is reported.
    """

    def __init__(
        self,
        read_rows: Callable[[str], rows_lib.Rows],
        list_splits: Callable[[], Sequence[str]],
        settings: Callable[[], Any],
        reporting: rows_lib.Reporting,
    ):
        self._list_splits, self.settings, self.reporting = list_splits, settings, reporting
        super().__init__(read_rows, {})

    splits = property(lambda self: tuple(self._list_splits()))  # names of those that have rows

    def num_input_examples(self, split: str) -> int:
        """Rows of a split."""
        return len(self.rows(split))


class LazyMixture(seqio.Mixture):
    """A mixture of the tasks that `list_tasks` names; `rate` gives a task's relative rate."""

    def __init__(
        self, name: str, list_tasks: Callable[[], Sequence[str]], rate: Callable[[str], float]
    ):
        # Not SeqIO's own constructor, which wants to see the tasks now.
        self._name, self._source_info = name, None
        self._sub_mixtures: list[seqio.Mixture] = []
        self._sample_fn = functools.partial(
            tf.data.Dataset.sample_from_datasets, stop_on_empty_dataset=True
        )
        self._list_tasks, self._rate = list_tasks, rate

    @property
    def tasks(self) -> list[seqio.Task]:
        """The tasks, by name."""
        return [seqio.TaskRegistry.get(name) for name in sorted(self._list_tasks())]

    @property
    def rate_per_task_name(self) -> Mapping[str, float]:
        """The rate of each task."""
        return {task.name: self._rate(task.name) for task in self.tasks}

    total_rate = property(lambda self: sum(self.rate_per_task_name.values()))
    output_features = property(lambda self: FEATURES)  # those of every task here

    def get_rate(self, task: seqio.Task) -> float:
        """The rate of a task of the mixture."""
        return self._rate(task.name)


def task_name(prefix: str, name: str) -> str:
    """A benchmark's own name of a task as SeqIO allows it: `superni_task073_x_y`, dots kept."""
    return prefix + "_" + re.sub(r"[^\w.]+", "_", name)


def add_task(
    prefix: str,
    name: str,
    read_rows: Callable[[str, str], rows_lib.Rows],
    list_splits: Callable[[str], Sequence[str]],
    settings: Callable[[], Any],
    metric_fns: Sequence[Callable[..., Mapping[str, float]]],
    reporting: rows_lib.Reporting = rows_lib.NOT_REPORTED,
) -> str:
    """Registers a task unless it is there; returns SeqIO's name of it.

    `read_rows` and `list_splits` get `name`, the benchmark's own; `settings` as in `LazySource`.
    """
    registered = task_name(prefix, name)
    if registered not in seqio.TaskRegistry.names():
        own = [functools.partial(function, name) for function in (read_rows, list_splits)]
        seqio.TaskRegistry.add(
            registered,
            source=LazySource(*own, settings, reporting),
            preprocessors=[seqio.preprocessors.append_eos],
            output_features=FEATURES,
            metric_fns=metric_fns,
        )
    return registered


def add_mixture(
    name: str,
    list_tasks: Callable[[], Sequence[str]],
    rate: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Registers a mixture unless it is there."""
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add_provider(name, LazyMixture(name, list_tasks, rate))


def add_files(own: files.Files, name: str | None = None) -> str:
    """Registers a user's files for SeqIO and returns the name: of a task, or, where a column tells
    tasks apart, of the mixture of one task each, every row of which is drawn equally often.

    `name` is by default that of the file. Raises ValueError if it is taken.
    """
    name = name or re.sub(r"[^\w.]+", "_", str(own))
    own_ids = seqio_vocabularies.Wrapped(functools.partial(vocabularies.get, own.vocabulary))
    own_ids.check_padding()
    feature = seqio.Feature(own_ids, add_eos=True)
    features = {"inputs": feature, "targets": feature}
    if own.has_tasks:
        features["task_ids"] = _scalar
    names = {task: task_name(name, task.name) if own.has_tasks else name for task in own.tasks}
    for task, registered in names.items():
        splits = functools.partial(list, task.splits)
        seqio.TaskRegistry.add(
            registered,
            source=LazySource(task.rows, splits, own.itself, task.reporting),
            preprocessors=[seqio.preprocessors.append_eos],
            output_features=features,
        )
    if own.has_tasks:
        rates = [(registered, own.get_rate(task)) for task, registered in names.items()]
        seqio.MixtureRegistry.add(name, rates)
    return name


def num_rows(registered: str) -> float:
    """Training rows of a task: as its rate, every row of a mixture is drawn equally often."""
    return float(seqio.TaskRegistry.get(registered).source.num_input_examples("train"))


def lines(examples: Iterable[TextExample], max_inputs: int) -> Iterator[row_store.Line]:
    """Examples as ids; inputs of over `max_inputs` tokens, end mark included, keep their `ending`.

    Without an ending, an input stays as long as it is, and batches cut it from the right.
    """
    vocabulary = vocabularies.get()
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    remembered = functools.cache(encode)
    for example in examples:
        inputs = encode(example.inputs)
        if len(inputs) >= max_inputs and example.ending:
            ending = remembered(example.ending)
            inputs = np.concatenate([inputs[: max_inputs - 1 - len(ending)], ending])
        targets = remembered(example.targets)
        yield row_store.Line(inputs, targets, references=example.references)


def encode(examples: Iterable[TextExample], task_id: int, max_inputs: int) -> rows_lib.Rows:
    """Rows of ids in memory, see `lines`; `task_id` is that of all of them."""
    found = list(lines(examples, max_inputs))
    has_references = any(line.references for line in found)
    return rows_lib.Rows(
        rows_lib.Ragged.from_sequences([line.inputs for line in found]),
        rows_lib.Ragged.from_sequences([line.targets for line in found]),
        _scalars(len(found), task_id, 0),
        references=[line.references for line in found] if has_references else (),
    )


def _scalars(count: int, task_id: int, template_id: int) -> Mapping[str, np.ndarray]:
    """The same ids for every row, without memory for them."""
    ids = {"task_ids": task_id, "template_ids": template_id}
    return {name: np.broadcast_to(np.int32(value), (count,)) for name, value in ids.items()}


def as_rows(
    found: row_store.Stored,
    task_id: int,
    template_id: int = 0,
    start: int = 0,
    end: int | None = None,
) -> rows_lib.Rows:
    """Rows `start` to `end` (None: all) of a cache of ids, all of one task and wording."""
    end = len(found) if end is None else end
    inputs, targets = found.inputs.slice(start, end), found.targets.slice(start, end)
    return rows_lib.Rows(inputs, targets, _scalars(end - start, task_id, template_id))
