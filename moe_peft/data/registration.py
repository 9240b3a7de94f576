"""SeqIO tasks over files that a user brings.

Registering reads nothing: a task's splits and rows, and the tasks of a mixture, are found when
somebody asks for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any
import zlib

import numpy as np
import seqio
import tensorflow as tf

from moe_peft.data import row_store, rows, vocabularies

_text = seqio.Feature(vocabularies.Configured(), add_eos=True)
_scalar = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0)
# Metadata of a field of settings that says where files are; what is in them is what counts.
PATH = {"is_path": True}
FEATURES = {"inputs": _text, "targets": _text, "task_ids": _scalar, "template_ids": _scalar}


@dataclasses.dataclass(frozen=True)
class TextExample:
    """A question and its answer, before they become ids."""

    inputs: str
    targets: str
    ending: str = ""  # a tail of `inputs` that stays when too long an input is cut
    references: tuple[str, ...] = ()  # every accepted answer; empty where it is `targets` alone


@dataclasses.dataclass(frozen=True)
class Reporting:
    """How a benchmark reports a task."""

    metric: str | None = None  # a name in `evaluation.metrics`; None: the benchmark names none
    group: str | None = None  # what it is reported under; None: its own name


class LazySource(rows.RowsSource):
    """Rows in memory whose splits and sizes are known only once the files are read.

    `settings` gives the settings in force of a benchmark, a dataclass whose module and gin name
    agree; `reporting` is how the task is reported.
    """

    def __init__(
        self,
        read_rows: Callable[[str], rows.Rows],
        list_splits: Callable[[], Sequence[str]],
        settings: Callable[[], Any],
        reporting: Reporting,
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
    read_rows: Callable[[str, str], rows.Rows],
    list_splits: Callable[[str], Sequence[str]],
    settings: Callable[[], Any],
    metric_fns: Sequence[Callable[..., Mapping[str, float]]],
    reporting: Reporting = Reporting(),
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


def num_rows(registered: str) -> float:
    """Training rows of a task: as its rate, every row of a mixture is drawn equally often."""
    return float(seqio.TaskRegistry.get(registered).source.num_input_examples("train"))


def draw_answer(accepted: Sequence[str], text: str, seed: int) -> str:
    """One of the accepted answers, drawn once for each seed and text."""
    if len(accepted) == 1:
        return accepted[0]
    generator = np.random.default_rng([seed, zlib.crc32(text.encode())])
    return accepted[generator.integers(len(accepted))]


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


def encode(examples: Iterable[TextExample], task_id: int, max_inputs: int) -> rows.Rows:
    """Rows of ids in memory, see `lines`; `task_id` is that of all of them."""
    found = list(lines(examples, max_inputs))
    has_references = any(line.references for line in found)
    return rows.Rows(
        rows.Ragged.from_sequences([line.inputs for line in found]),
        rows.Ragged.from_sequences([line.targets for line in found]),
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
) -> rows.Rows:
    """Rows `start` to `end` (None: all) of a cache of ids, all of one task and wording."""
    end = len(found) if end is None else end
    inputs, targets = found.inputs.slice(start, end), found.targets.slice(start, end)
    return rows.Rows(inputs, targets, _scalars(end - start, task_id, template_id))
