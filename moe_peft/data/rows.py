"""Tokenised rows, in memory or mapped into it, that are read one by one."""

from collections.abc import Mapping, Sequence
import dataclasses

from jaxtyping import Int
import numpy as np

# Metadata of a field of settings that says where files are; what is in them is what counts.
PATH = {"is_path": True}


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


class Picked:
    """Some sequences of a `Ragged`, in the order of `places`; nothing is copied."""

    def __init__(self, sequences: Ragged, places: Int[np.ndarray, " rows"]):
        self._sequences, self._places = sequences, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        return self._sequences[int(self._places[index])]

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Length of every sequence."""
        return self._sequences.lengths[self._places]

    def copied(self) -> Ragged:
        """The sequences end to end."""
        return Ragged.from_sequences([self[index] for index in range(len(self))])


@dataclasses.dataclass(frozen=True)
class Reporting:
    """How a benchmark reports a task."""

    metric: str | None = None  # a name in `evaluation.metrics`; None: the benchmark names none
    group: str | None = None  # what it is reported under; None: its own name


NOT_REPORTED = Reporting()


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples of one split of one task. Ids have no end mark."""

    inputs: Ragged | Picked
    targets: Ragged | Picked
    # Further features, one number a row (`task_ids`, `template_ids`), int32.
    scalars: Mapping[str, Int[np.ndarray, " rows"]] = dataclasses.field(default_factory=dict)
    answer_choices: Sequence[tuple[str, ...]] = ()  # of each row; empty where answers are free text
    references: Sequence[tuple[str, ...]] = ()  # all accepted answers; empty: `targets` says all

    def __len__(self) -> int:
        return len(self.inputs)
