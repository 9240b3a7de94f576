"""A few examples of a new task: which are shots, which select, which are reported.

Everything is drawn from the run's seed: the shots by shuffling the task's train split with NumPy's
old generator and taking the first ones, as T-Few and MHR do; validation examples from what follows
them. The reported split is never touched. What a training step sees is a function of the seed and
the step, so a run resumes anywhere and does not depend on other runs.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re

from jaxtyping import Bool, Int
import numpy as np

from moe_peft import errors
from moe_peft.data import encoding, evaluation_data, lookup, rows
from moe_peft.models import few_shot, special_ids

CHOICES = "choices"  # token ids of every choice, ragged; `scoring.pack_choices` makes arrays
_DROPPED = ("template_ids", "decoder_loss_weights", "task_ids")

Count = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many examples of each task are shots, and how many select.

    Counts are numbers, or numbers by regular expressions on whole task names, of which the first
    that matches counts. A training step sees one wording of an example, drawn each time; evaluation
    sees all.
    """

    shots: Count | None  # None for all examples that are not for validation
    validation: Count = 0
    wordings: Count = 1  # consecutive rows that are one example in other words

    def counts_of(self, task: str) -> tuple[int | None, int]:
        """(shots, validation examples) of a task."""
        shots = None if self.shots is None else _count("shots", self.shots, task, 1)
        return shots, _count("validation_shots", self.validation, task, 0)

    def wordings_of(self, task: str) -> int:
        """Rows of one example of a task."""
        return _count("wordings", self.wordings, task, 1)


def _count(what: str, counts: Count, task: str, least: int) -> int:
    found = counts
    if isinstance(counts, Mapping):
        matching = [number for pattern, number in counts.items() if re.fullmatch(pattern, task)]
        if not matching:
            raise errors.UserError(
                f"{what} says nothing about the task {task!r}; it has {', '.join(counts)}."
            )
        found = matching[0]
    if not isinstance(found, int) or found < least:
        raise errors.UserError(f"{what} of {task!r} is {found!r}; expected {least} or more.")
    return found


@dataclasses.dataclass(frozen=True)
class Draw:
    """Row numbers in the train split that one seed uses, every example's wordings in a row."""

    shots: Int[np.ndarray, "e w"]
    validation: Int[np.ndarray, "v w"]  # disjoint from the shots


def draw(task: str, num_rows: int, sizes: Sizes, seed: int) -> Draw:
    """Draws from the `num_rows` rows of a train split; a UserError where there are too few."""
    num_wordings = sizes.wordings_of(task)
    if num_rows % num_wordings:
        raise errors.UserError(
            f"The train split of {task!r} has {num_rows} rows, which do not divide into examples "
            f"of {num_wordings} wordings."
        )
    available = num_rows // num_wordings
    num_shots, num_validation = sizes.counts_of(task)
    if num_shots is None:
        num_shots = max(available - num_validation, 1)
    if num_shots + num_validation > available:
        more = f" and {num_validation} for validation" if num_validation else ""
        raise errors.UserError(
            f"{task!r} has {available} training examples; {num_shots} shots{more} were asked for. "
            "Ask for fewer of this task: shots and validation_shots may be given by task name."
        )
    order = list(range(available))  # A list: NumPy shuffles arrays in another order.
    np.random.RandomState(seed).shuffle(order)
    wordings = np.array(order)[:, None] * num_wordings + np.arange(num_wordings)
    return Draw(wordings[:num_shots], wordings[num_shots : num_shots + num_validation])


def steps_in_epoch(num_shots: int, batch_size: int) -> int:
    """Whole batches of an epoch: the incomplete last one is dropped, unless it is the only one."""
    return max(num_shots // batch_size, 1)


def schedule(
    num_shots: int, wordings: int, batch_size: int, seed: int, steps: range
) -> Int[np.ndarray, "t b"]:
    """Rows that each step sees, as numbers in the list of all wordings of all shots.

    Every epoch has its own order and its own wordings. With fewer shots than a batch has room for,
    a batch is all of them, and the rest of it is -1: padding.
    """
    per_epoch = steps_in_epoch(num_shots, batch_size)

    @functools.lru_cache(maxsize=2)
    def epoch_rows(epoch):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(num_shots)
        return order * wordings + generator.integers(wordings, size=num_shots)

    found = np.full((len(steps), batch_size), -1, np.int32)
    for i, step in enumerate(steps):
        epoch, place = divmod(step, per_epoch)
        chosen = epoch_rows(epoch)[place * batch_size : (place + 1) * batch_size]
        found[i, : len(chosen)] = chosen
    return found


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples as arrays."""

    features: Mapping[str, np.ndarray]  # of `encoding.encode`, or choices and which one is right
    is_cut: Bool[np.ndarray, " e"]  # whether a target did not fit
    examples: Sequence[evaluation_data.Example]  # what each row is
    ids: special_ids.SpecialIds = special_ids.T5  # of the network

    def __len__(self) -> int:
        return len(self.examples)


@dataclasses.dataclass(eq=False)
class Task:
    """One task's rows, read once, encoded where they are needed.

    Making it reads nothing, but checks that the reported split exists. In names of the other
    splits, "{seed}" stands for the run's seed.
    """

    name: str  # of a SeqIO task
    feature_lengths: Mapping[str, int]  # tokens of "inputs" and "targets"
    test_split: str  # the reported one
    with_choices: bool  # encode answer choices where examples have some
    train_split: str = "train"  # where shots come from
    validation_split: str | None = None  # all of it; None: from what shots leave of `train_split`
    ids: special_ids.SpecialIds = special_ids.T5  # of the network

    def __post_init__(self):
        self._lengths = lookup.check_lengths(self.feature_lengths)
        (self._task,) = lookup.tasks_of(self.name)
        lookup.tasks_with(self.name, self.test_split)
        self._read = functools.cache(
            lambda split: evaluation_data.task_rows(self._task, split, self._lengths)
        )
        self._tokens = functools.lru_cache(maxsize=4096)(self._choice_tokens)

    def draw(self, sizes: Sizes, seed: int) -> tuple[Encoded, Encoded, int]:
        """(shots, validation examples, wordings of each) of one seed."""
        train = self._rows(self.train_split, seed)
        drawn = draw(self.name, len(train), sizes, seed)
        found, chosen = train, drawn.validation.reshape(-1)
        if self.validation_split is not None:
            found = self._rows(self.validation_split, seed)
            chosen = range(len(found))
        shots = self.encode(train, drawn.shots.reshape(-1))
        return shots, self.encode(found, chosen), drawn.shots.shape[1]

    def _rows(self, split: str, seed: int) -> rows.Rows:
        name = split.replace("{seed}", str(seed))
        lookup.tasks_with(self.name, name)
        return self._read(name)

    @functools.cached_property
    def test(self) -> Encoded:
        """The reported split."""
        found = self._read(self.test_split)
        return self.encode(found, range(len(found)))

    def encode(self, source: rows.Rows, chosen: Sequence[int]) -> Encoded:
        """Some rows, in that order; a UserError where a right answer is not one of the choices."""
        examples = [evaluation_data.example(self._task, source, int(index)) for index in chosen]
        pairs = [(source, int(index)) for index in chosen]
        features = encoding.encode(pairs, self._lengths, ids=self.ids)
        features = {k: v for k, v in features.items() if k not in _DROPPED}
        is_cut = np.array([len(source.targets[int(i)]) >= self._lengths[1] for i in chosen], bool)
        if self.with_choices and any(example.answer_choices for example in examples):
            texts = [example.answer_choices or (example.targets,) for example in examples]
            features[CHOICES] = [self._tokens(choices) for choices in texts]
            features[few_shot.GOLD] = np.array([_gold(example) for example in examples], np.int32)
        return Encoded(features, is_cut, examples, self.ids)

    def _choice_tokens(self, texts: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        encode = self._task.output_features["targets"].vocabulary.encode
        how = (self._lengths[1], self.ids.eos)
        return tuple(encoding.with_end(np.array(encode(text), np.int32), *how) for text in texts)


def _gold(example: evaluation_data.Example) -> int:
    choices = [choice.strip() for choice in example.answer_choices or (example.targets,)]
    if example.targets.strip() not in choices:
        raise errors.UserError(
            f"An example of {example.task!r} cannot be learnt: its target {example.targets!r} is "
            f"not one of its choices {choices}."
        )
    return choices.index(example.targets.strip())
