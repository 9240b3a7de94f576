"""The order of examples in a mixture of tasks held in memory."""

from collections.abc import Iterator, Sequence
import functools

import numpy as np

from moe_peft.data import rows

BLOCK = 1024  # examples whose tasks are drawn together; part of what a seed means


class Stream:
    """An endless stream of examples: tasks drawn by rate, each task going through its rows in a new
    order every epoch.

    A function of the seed alone: which example stands at place n does not depend on batch size or
    on where reading began. `sources` are the rows of each task, `rates` their relative rates.
    """

    def __init__(self, sources: Sequence[rows.Rows], rates: Sequence[float], seed: int):
        self.sources = list(sources)
        self._cumulative = np.cumsum(np.array(rates, float)) / np.sum(rates)
        self._seed = seed
        self._order = functools.lru_cache(maxsize=len(self.sources) + 1)(self._new_order)

    @functools.cached_property
    def lengths(self) -> list[dict[str, np.ndarray]]:
        """Tokens of each row of each task, without end marks."""
        return [{"inputs": s.inputs.lengths, "targets": s.targets.lengths} for s in self.sources]

    def _tasks(self, block: int) -> np.ndarray:
        """Task of each of the block's examples."""
        if len(self.sources) == 1:
            return np.zeros(BLOCK, int)
        draws = np.random.Generator(np.random.Philox(key=[self._seed, 2 * block])).random(BLOCK)
        return np.searchsorted(self._cumulative, draws, side="right")

    def _new_order(self, task: int, epoch: int) -> np.ndarray:
        """Order of a task's rows in one of its epochs."""
        generator = np.random.default_rng([self._seed, 1, task, epoch])
        # Kept for every task that has been met: four bytes a row, not eight.
        return generator.permutation(len(self.sources[task])).astype(np.uint32)

    def places(self, start: int) -> Iterator[tuple[int, int]]:
        """(task, row) of every example from place `start` on."""
        counts = np.zeros(len(self.sources), int)
        first, offset = divmod(start, BLOCK)
        for block in range(first):
            counts += np.bincount(self._tasks(block), minlength=len(counts))
        block = first
        while True:
            for place, task in enumerate(self._tasks(block)):
                epoch, index = divmod(int(counts[task]), len(self.sources[task]))
                counts[task] += 1
                if block > first or place >= offset:
                    yield int(task), int(self._order(int(task), epoch)[index])
            block += 1
