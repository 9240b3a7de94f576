"""Variants by parameters and score, and which of them no other one beats."""

from collections.abc import Sequence
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant."""

    name: str  # of the variant
    trainable: int  # parameters it trains for a new task
    scores: tuple[float, ...]  # one for each seed, averages over tasks, in [0, 1]
    seconds: float | None = None  # wall time of the adaptation of all tasks and seeds, if known

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.scores))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (divided by their number less one); None for one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    @property
    def median(self) -> float:
        """Over seeds."""
        return float(np.median(self.scores))

    @property
    def iqr(self) -> float | None:
        """Third less first quartile over seeds, linearly interpolated; None for one seed."""
        if len(self.scores) == 1:
            return None
        first, third = np.percentile(self.scores, [25, 75])
        return float(third - first)


def front(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that no other one equals with fewer parameters or beats with as many.

    By parameters, so that scores rise. Of rows with equal means and parameters all are kept.
    """

    def beats(one: Row, other: Row) -> bool:
        as_good = one.trainable <= other.trainable and one.mean >= other.mean
        return as_good and (one.trainable, one.mean) != (other.trainable, other.mean)

    best = [row for row in rows if not any(beats(other, row) for other in rows)]
    return sorted(best, key=lambda row: row.trainable)
