"""Tokenised rows in memory: a SeqIO source that can also be read row by row.

A suite of hundreds of small tasks needs hundreds of tf.data graphs to mix, which takes minutes to
build. Rows that fit in memory need none: `pipeline` reads them straight from their source, and T5X
still gets them through SeqIO.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

from jaxtyping import Int
import numpy as np
import seqio
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of any length, stored end to end."""

    flat: Int[np.ndarray, " total"]  # all ids, one sequence after another
    ends: Int[np.ndarray, " rows"]  # where each sequence ends in `flat`

    @classmethod
    def from_sequences(cls, sequences: Sequence[np.ndarray]) -> "Ragged":
        """Stores a list of sequences."""
        ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
        return cls(np.concatenate([*sequences, np.zeros(0, np.int32)]).astype(np.int32), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        start = self.ends[index - 1] if index else 0
        return self.flat[start : self.ends[index]]

    def slice(self, start: int, end: int) -> "Ragged":
        """Sequences `start` to `end`, sharing memory."""
        first = self.ends[start - 1] if start else 0
        ends = self.ends[start:end] - first if start else self.ends[:end]  # no copy of all ends
        return Ragged(self.flat[first : self.ends[end - 1]], ends)

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Length of every sequence."""
        return np.diff(self.ends, prepend=0)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples of one split of one task. Ids have no end mark."""

    inputs: Ragged
    targets: Ragged
    # Further features, one number a row (`task_ids`, `template_ids`), int32.
    scalars: Mapping[str, Int[np.ndarray, " rows"]] = dataclasses.field(default_factory=dict)
    answer_choices: Sequence[tuple[str, ...]] = ()  # of each row; empty where answers are free text
    references: Sequence[tuple[str, ...]] = ()  # all accepted answers; empty: `targets` says all

    def __len__(self) -> int:
        return len(self.inputs)


class RowsSource(seqio.DataSource):
    """A SeqIO source over `Rows`; tasks append the end mark and nothing else."""

    def __init__(self, rows: Callable[[str], Rows], sizes: Mapping[str, int]):
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
        ragged = lambda column: tf.RaggedTensor.from_row_limits(
            column.flat.astype(np.int32), column.ends, validate=False
        )
        columns = {"inputs": ragged(rows.inputs), "targets": ragged(rows.targets)}
        dataset = tf.data.Dataset.from_tensor_slices({**columns, **rows.scalars})
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset
