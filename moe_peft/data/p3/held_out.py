"""Held-out evaluation sets from rank-classification records: one question, all its answer choices.

P3 stores a `_score_eval` task as one row per (example, choice), shuffled. `examples` brings the
choices of an example together; `Woven` puts the wordings of one item side by side, for templates
that ask about the same items.
"""

import collections
from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from moe_peft.data import bad_rows, row_store, rows
from moe_peft.data.p3 import records


def examples(found: Iterable[records.Record], where: str) -> list[records.Record]:
    """One record per example of a `_score_eval` task, by their numbers, with `answer_choices`.

    Raises:
      UserError: rows without number, a choice that is missing or there twice, no right choice.
    """
    groups: dict[int, dict[int, records.Record]] = {}

    def group(numbered: tuple[int, records.Record]) -> None:
        number, record = numbered
        if record.idx is None:
            reason = "'idx' is missing; has this task answer choices?"
            raise bad_rows.BadRow(where, f"row {number}", reason)
        choices = groups.setdefault(record.idx[0], {})
        if record.idx[1] in choices:
            raise bad_rows.BadRow(where, f"row {number}", f"idx {record.idx} is there twice")
        first = next(iter(choices.values()), record)
        if record.inputs == first.inputs:  # as it should be; kept once, then
            record = dataclasses.replace(record, inputs=first.inputs, input_ids=first.input_ids)
        choices[record.idx[1]] = record

    with bad_rows.counting() as skipped:
        collections.deque(bad_rows.parsed(group, enumerate(found)), maxlen=0)
    # A row that was skipped may have been any example's last choice.
    least = max(map(len, groups.values()), default=0) if skipped else 1

    def example(number: int) -> records.Record:
        there = sorted(groups[number])
        choices = [groups[number][i] for i in there]
        right = next((choice for choice in choices if choice.is_correct), None)
        reason = "" if right else "no choice is right"
        if there != list(range(len(there))) or len(there) < least:
            reason = f"only the choices {there} are there"
        if reason:
            raise bad_rows.BadRow(where, f"example {number}", reason)
        return dataclasses.replace(right, answer_choices=tuple(c.targets for c in choices))

    return list(bad_rows.parsed(example, sorted(groups)))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sequences of several templates, template after template."""

    parts: Sequence[rows.Ragged | row_store.Texts]  # of each template

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int):
        starts = np.cumsum([0, *map(len, self.parts)])
        template = int(np.searchsorted(starts, index, side="right")) - 1
        return self.parts[template][index - starts[template]]

    # As of `rows.Ragged`; `flat` is a copy here.
    lengths = property(lambda self: np.concatenate([part.lengths for part in self.parts]))
    flat = property(lambda self: np.concatenate([self[i] for i in range(len(self))]))
    ends = property(lambda self: np.cumsum(self.lengths))


class Woven(Joined):
    """Sequences of templates that ask about the same items: all wordings of an item in a row."""

    def __getitem__(self, index: int):
        item, template = divmod(index, len(self.parts))
        return self.parts[template][item]

    lengths = property(lambda self: np.stack([p.lengths for p in self.parts], axis=1).ravel())
