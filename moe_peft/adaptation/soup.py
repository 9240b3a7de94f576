"""AdapterSoup: which training tasks' adapters to average for a new task, by likeness of their data.

Every task has an embedding, the mean of its examples' sentence embeddings. A new task takes the
training tasks whose embeddings have the largest cosine with its own, with equal weights.
"AdapterSoup" (Chronopoulou et al. 2023) as the baseline in "Multi-Head Adapter Routing" (Caccia et
al. 2023), which gives neither encoder nor number of neighbours.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

import gin
from jaxtyping import Float
import numpy as np

from moe_peft import errors

if TYPE_CHECKING:  # Data readers import TensorFlow.
    from moe_peft.adaptation import data

Encoder = Callable[[Sequence[str]], Float[np.ndarray, "b d"]]
# From the texts of all training tasks to an encoder, which may have learnt from them.
EncoderMaker = Callable[[Sequence[str]], Encoder]

_ANY_LENGTH = (2**31, 2**31)  # Texts are compared whole.


@gin.register(module="soup")
def char_ngrams(shortest: int = 2, longest: int = 4, num_buckets: int = 4096) -> EncoderMaker:
    """TF-IDF of hashed character n-grams within words: needs no pretrained encoder.

    N-grams have `shortest` to `longest` characters; an embedding is `num_buckets` wide.
    """
    if not 1 <= shortest <= longest or num_buckets < 1:
        raise errors.UserError(
            f"char_ngrams expects 1 <= shortest <= longest and num_buckets >= 1, got {shortest}, "
            f"{longest} and {num_buckets}."
        )

    def fit(texts):
        from sklearn.feature_extraction import text

        count = text.HashingVectorizer(
            analyzer="char_wb",
            ngram_range=(shortest, longest),
            n_features=num_buckets,
            alternate_sign=False,
            norm=None,
        )
        weigh = text.TfidfTransformer(sublinear_tf=True).fit(count.transform(texts))
        return lambda texts: weigh.transform(count.transform(texts)).toarray()

    return fit


@gin.register(module="soup")
def pretrained(encoder: Encoder) -> EncoderMaker:
    """A sentence encoder as it is, such as `@sentences.minilm()`."""
    return lambda texts: encoder


@gin.register(module="soup")
@dataclasses.dataclass(frozen=True)
class Neighbours:
    """How neighbours are found."""

    num_neighbours: int = 5  # training tasks whose adapters are averaged
    # Leave out those with a smaller cosine, but never the nearest one; None for no such limit. What
    # is a small cosine depends on the encoder.
    threshold: float | None = None
    # `char_ngrams` or `pretrained`.
    encoder: EncoderMaker = dataclasses.field(default_factory=char_ngrams)
    max_examples: int = 100  # of a training task; a random sample where there are more
    with_targets: bool = False  # embed input and answer, not the input alone
    seed: int = 0  # of that sample

    def __post_init__(self):
        for name in ("num_neighbours", "max_examples"):
            errors.check_at_least(f"Neighbours.{name}", getattr(self, name), 1)

    def text(self, example: Any) -> str:
        """What is embedded of an `evaluation_data.Example`."""
        return f"{example.inputs} {example.targets}" if self.with_targets else example.inputs

    def weights_from(self, similarities: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns the weights, 1/k for each of the k chosen tasks; NaN is never chosen."""
        order = np.argsort(-similarities, kind="stable")[: self.num_neighbours]
        order = order[~np.isnan(similarities[order])]
        if self.threshold is not None:
            order = order[: max(1, int(np.sum(similarities[order] >= self.threshold)))]
        weights = np.zeros(len(similarities), np.float32)
        weights[order] = 1.0 / len(order)
        return weights


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """Which training tasks are averaged for each new task."""

    sources: Sequence[str]  # name of every task id of the multi-task run; "" where it has no data
    # New task -> cosine with each of them, NaN where there is no data.
    similarities: Mapping[str, Float[np.ndarray, " n"]]
    weights: Mapping[str, Float[np.ndarray, " n"]]  # new task -> what each counts in the average

    def chosen_for(self, new: str) -> list[tuple[str, float, float]]:
        """(training task, cosine, weight) of the chosen ones, nearest first."""
        similarities, weights = self.similarities[new], self.weights[new]
        chosen = sorted(np.flatnonzero(weights), key=lambda i: -similarities[i])
        return [(self.sources[i], float(similarities[i]), float(weights[i])) for i in chosen]

    def table(self) -> str:
        """A Markdown table, one row per new task."""
        lines = ["| new task | averages the adapters of (cosine) |", "|---|---|"]
        for new in self.weights:
            names = (f"{name} ({cosine:.2f})" for name, cosine, _ in self.chosen_for(new))
            lines.append(f"| {new} | {', '.join(names)} |")
        return "\n".join(lines)

    def write(self, folder: pathlib.Path | str) -> list[pathlib.Path]:
        """Writes soup.md and soup.json into `folder`; returns their paths."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = lambda row: dict(zip(("task", "cosine", "weight"), row))
        chosen = {new: [named(row) for row in self.chosen_for(new)] for new in self.weights}
        texts = {"soup.md": self.table(), "soup.json": json.dumps(chosen, indent=1)}
        for name, text in texts.items():
            (folder / name).write_text(text + "\n")
        return [folder / name for name in texts]


class Sources:
    """Embeddings of the tasks of a multi-task run."""

    def __init__(self, mixture: str, num_tasks: int, settings: Neighbours):
        """Reads and embeds the train split of every task; UserError: their ids do not fit."""
        texts = _source_texts(mixture, num_tasks, settings)
        self.settings = settings
        self.names = [name for name, _ in texts]  # of every task id
        self._encode = settings.encoder([text for _, own in texts for text in own])
        self._embeddings = [self._embed(own) if own else None for _, own in texts]

    def compare(self, new: Mapping[str, Sequence[str]]) -> Neighbourhood:
        """Finds the neighbours of new tasks, given texts of each."""
        similarities = {name: self._similarities(texts) for name, texts in new.items()}
        weights = {name: self.settings.weights_from(found) for name, found in similarities.items()}
        return Neighbourhood(self.names, similarities, weights)

    def _embed(self, texts: Sequence[str]) -> Float[np.ndarray, " d"]:
        """The mean embedding, of norm 1 (0 where no text has anything that the encoder knows)."""
        mean = np.mean(np.asarray(self._encode(texts), np.float64), axis=0)
        return mean / max(np.linalg.norm(mean), 1e-12)

    def _similarities(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        own = self._embed(texts)
        return np.array([np.nan if e is None else float(e @ own) for e in self._embeddings])


def compare(
    train_mixture: str,
    new_mixture: str,
    num_tasks: int,
    settings: Neighbours | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
) -> Neighbourhood:
    """Returns, for each new task, the weights of the n tasks that the multi-task run tells apart.

    `rows` are those of the train split that are each new task's shots. None takes a sample of all,
    which a few-shot run does not have.
    """
    from moe_peft.data import lookup

    settings = settings or Neighbours()
    new = {
        task.name: _texts(task, settings, None if rows is None else rows[task.name])
        for task in lookup.tasks_with(new_mixture, "train")
    }
    return Sources(train_mixture, num_tasks, settings).compare(new)


@gin.register(module="soup")
def task_weights(
    source_mixture: str,
    num_tasks: int,
    shots: int | Mapping[str, int],
    wordings: int | Mapping[str, int] = 1,
    neighbours: Neighbours | None = None,
) -> Callable[["data.Job"], Float[np.ndarray, " n"]]:
    """Returns a run's task and seed -> weights of the source's tasks, for `adapt.task_weights`.

    A new task is known by the shots of the run alone, all their wordings. The multi-task run was
    trained on `source_mixture` and tells `num_tasks` ids apart; `shots` and `wordings` are as
    `adapt` has them.
    """
    from moe_peft.data import fewshot, lookup

    settings, sizes = neighbours or Neighbours(), fewshot.Sizes(shots, 0, wordings)
    lookup.get(source_mixture)
    sources = functools.cache(lambda: Sources(source_mixture, num_tasks, settings))

    def weights(job: "data.Job") -> Float[np.ndarray, " n"]:
        (task,) = lookup.tasks_of(job.task)
        number = len(_rows(task))
        drawn = fewshot.draw(job.task, number, sizes, job.seed)
        texts = _texts(task, settings, drawn.shots.reshape(-1).tolist())
        return sources().compare({job.task: texts}).weights[job.task]

    return weights


def _rows(task, limit: int | None = None):
    from moe_peft.data import evaluation_data

    return evaluation_data.task_rows(task, "train", _ANY_LENGTH, limit)


def _examples(task, rows, chosen: Sequence[int]) -> list:
    from moe_peft.data import evaluation_data

    return [evaluation_data.example(task, rows, int(index)) for index in chosen]


def _texts(task, settings: Neighbours, chosen: Sequence[int] | None) -> list[str]:
    """Texts of some rows of the train split; None takes a sample."""
    rows = _rows(task, settings.max_examples if chosen is None else None)
    chosen = _sample(len(rows), settings) if chosen is None else chosen
    return [settings.text(example) for example in _examples(task, rows, chosen)]


def _sample(number: int, settings: Neighbours) -> np.ndarray:
    order = np.random.default_rng(settings.seed).permutation(number)
    return np.sort(order[: settings.max_examples])


def _source_texts(
    mixture: str, num_tasks: int, settings: Neighbours
) -> list[tuple[str, list[str]]]:
    """(name, texts) of every task id; where templates are tasks, their numbers are in the name."""
    from moe_peft.data import lookup, task_ids

    found = [("", []) for _ in range(num_tasks)]
    for task in lookup.tasks_with(mixture, "train"):
        rows = _rows(task)
        if "task_ids" not in rows.scalars:
            raise errors.UserError(f"The task {task.name!r} of {mixture!r} carries no task ids.")
        ids = task_ids.per_template(rows.scalars)["task_ids"]
        task_ids.check_ids(ids, num_tasks, repr(task.name))
        for task_id in np.unique(ids):
            own = np.flatnonzero(ids == task_id)
            examples = _examples(task, rows, own[_sample(len(own), settings)])
            is_template = len(np.unique(ids)) > 1
            name = f"{task.name}, template {examples[0].template_id}" if is_template else task.name
            found[task_id] = (name, [settings.text(example) for example in examples])
    return found
