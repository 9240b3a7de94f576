"""How sure an average is: the same number over resamples of what it was computed from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import statistics
from typing import Any
import zlib

import gin
from jaxtyping import Float, Int
import numpy as np

from moe_peft import errors
from moe_peft.evaluation import metrics

_OVER = ("examples", "templates", "tasks")
_NUMBERS_AT_ONCE = 1_000_000


@gin.register(module="evaluation")
@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals by resampling with replacement (Efron and Tibshirani 1993, ch. 13)."""

    # "examples" of each task; where all its templates have the same number of rows, the k-th row of
    # each is the same example, drawn for all of them together. "templates" of each task. "tasks":
    # what the overall number is a mean of, tasks or groups; only that number gets an interval.
    over: str = "examples"
    resamples: int = 1000  # how many
    level: float = 0.95  # share of resamples inside the interval
    seed: int = 0  # of the draws; those of a task do not depend on the tasks next to it

    def __post_init__(self):
        errors.check_one_of("Bootstrap.over", self.over, _OVER)
        if self.resamples < 2 or not 0 < self.level < 1:
            raise errors.UserError(
                f"Bootstrap has {self.resamples} resamples and level {self.level}; expected at "
                "least 2 and a share between 0 and 1."
            )

    def generator(self, name: str) -> np.random.Generator:
        """Random numbers of one task."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def interval(self, values: Float[np.ndarray, " B"]) -> list[float]:
        """[low, high] of the values over resamples."""
        return np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2]).tolist()


@dataclasses.dataclass(frozen=True)
class Examples:
    """What the score of a template is computed from."""

    values: np.ndarray  # scores of the examples [n], or pairs [n, 2] for a metric of all of them
    of_pairs: Callable[[np.ndarray], float] | None = None  # that metric; None: the mean

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "Examples":
        """From rows of predictions; UserError: a metric of all of them is not the only one."""
        names = list(dict.fromkeys(row.get("metric") for row in rows))
        together = [name for name in names if getattr(metrics.METRICS.get(name), "of_pairs", None)]
        if not together:  # Every row has a score of its own, by whatever metric.
            return cls(np.array([float(row["score"]) for row in rows]))
        if len(names) > 1:
            raise errors.UserError(
                f"Template {rows[0].get('template')} of {rows[0].get('task')!r} has rows of "
                f"{' and '.join(map(str, names))}; {together[0]} needs all rows of a template. "
                "Choose another metric, or leave rank_choices off."
            )
        metric = metrics.METRICS[names[0]]
        right = [metrics.references_of(row)[0] for row in rows]
        return cls(metric.pairs([row["prediction"] for row in rows], right), metric.of_pairs)

    def __len__(self) -> int:
        return len(self.values)

    def score(self) -> float:
        """Of all examples."""
        return self.of_pairs(self.values) if self.of_pairs else statistics.fmean(self.values)

    def resampled(self, chosen: Int[np.ndarray, "B n"]) -> Float[np.ndarray, " B"]:
        """Of the examples with these numbers."""
        if self.of_pairs is None:
            return self.values[chosen].mean(axis=1)
        return np.array([self.of_pairs(self.values[numbers]) for numbers in chosen])


def over_examples(
    name: str, templates: Sequence[Examples], how: Bootstrap
) -> Float[np.ndarray, "T B"]:
    """Scores of a task's templates over resamples of its examples."""
    generator = how.generator(name)
    are_same = len(set(map(len, templates))) == 1
    together = [templates] if are_same else [[template] for template in templates]
    found = []
    for members in together:
        draws = _draws(generator, len(members[0]), how.resamples)
        scores = [[template.resampled(chosen) for template in members] for chosen in draws]
        found.append(np.concatenate(scores, axis=1))
    return np.concatenate(found)


def over_templates(
    name: str, scores: Float[np.ndarray, " T"], how: Bootstrap
) -> Float[np.ndarray, "T B"]:
    """As many scores of a task's templates, drawn from all of them."""
    return scores[how.generator(name).integers(len(scores), size=(len(scores), how.resamples))]


def _draws(generator: np.random.Generator, size: int, count: int) -> Iterator[np.ndarray]:
    """Numbers of examples, [some, size] at a time, `count` rows in all."""
    at_once = max(1, _NUMBERS_AT_ONCE // size)
    for start in range(0, count, at_once):
        yield generator.integers(size, size=(min(at_once, count - start), size))
