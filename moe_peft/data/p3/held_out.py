"""Held-out evaluation sets from rank-classification records: one question, all its answer choices.

P3 stores a `_score_eval` task as one row per (example, choice), shuffled. `examples` brings the
choices of an example together; `Woven` puts the wordings of one item side by side, for templates
that ask about the same items.
"""

from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from moe_peft import errors
from moe_peft.data import row_store, rows
from moe_peft.data.p3 import records


def examples(found: Iterable[records.Record], where: str) -> list[records.Record]:
    """One record per example, in the order of their numbers, with `answer_choices`.

    Args:
      found: the rows of a `_score_eval` task.
      where: what messages call them.

    Raises:
      UserError: rows without number, a choice that is missing or there twice, no right choice.
    """
    groups: dict[int, dict[int, records.Record]] = {}
    for number, record in enumerate(found):
        if record.idx is None:
            raise errors.UserError(f"{where}, row {number}: 'idx' is missing.")
        group = groups.setdefault(record.idx[0], {})
        if record.idx[1] in group:
            raise errors.UserError(f"{where}, row {number}: idx {record.idx} is there twice.")
        group[record.idx[1]] = record
    return [_example(groups[number], number, where) for number in sorted(groups)]


def _example(group: dict[int, records.Record], number: int, where: str) -> records.Record:
    choices = [group[i] for i in sorted(group)]
    if sorted(group) != list(range(len(group))):
        raise errors.UserError(f"{where}: example {number} has the choices {sorted(group)} only.")
    right = [choice for choice in choices if choice.is_correct]
    if not right:
        raise errors.UserError(f"{where}: example {number} has no right choice.")
    return dataclasses.replace(
        right[0],
        answer_choices=tuple(choice.targets for choice in choices),
        idx=(number, right[0].idx[1]),
    )


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sequences of several templates, template after template.

    Attributes:
      parts: of each template.
    """

    parts: Sequence[rows.Ragged | row_store.Texts]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int):
        starts = np.cumsum([0, *map(len, self.parts)])
        template = int(np.searchsorted(starts, index, side="right")) - 1
        return self.parts[template][index - starts[template]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of every sequence."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def flat(self) -> np.ndarray:
        """All ids, one sequence after another; a copy."""
        return np.concatenate([self[i] for i in range(len(self))])

    @property
    def ends(self) -> np.ndarray:
        """Where each sequence ends in `flat`."""
        return np.cumsum(self.lengths)


class Woven(Joined):
    """Sequences of templates that ask about the same items: all wordings of an item in a row."""

    def __getitem__(self, index: int):
        item, template = divmod(index, len(self.parts))
        return self.parts[template][item]

    @property
    def lengths(self) -> np.ndarray:
        """Length of every sequence."""
        return np.stack([part.lengths for part in self.parts], axis=1).ravel()
