"""Which (data set, template) tasks P3 and the T0 mixtures have, how they are called, their caps.

Sanh et al. 2022, "Multitask Prompted Training Enables Zero-Shot Task Generalization": 38 training
data sets with 313 templates in `t0`, 10 more (79) in `t0+`, 6 more (72) in `t0++`. The 24 templates
that the original mixture excludes by name are in none of them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib.resources
import json
import pathlib
import re
from typing import Any

from moe_peft import errors

MAX_EXAMPLES = 500_000  # of a data set, over its templates
MIXTURES = ("t0", "t0+", "t0++")
TABLE_FILE = "tasks.json"
ANLI_ROUNDS = ("r1", "r2", "r3")
NOT_PUBLISHED = ("storycloze",)  # on request only, so not among P3's records


@dataclasses.dataclass(frozen=True)
class Published:
    """What P3 publishes of a data set; nothing where a table does not say."""

    rows: Mapping[str, int]  # of the data set, by split
    fewer: Mapping[str, Mapping[str, int]]  # by template, the splits where it has fewer rows
    # A letter for each template: "f" its answer choices are the same for every row, "p" they are
    # each row's own, "-" there are none.
    choices: str
    num_choices: int | None  # of every row; None where they differ
    hidden: tuple[str, ...]  # splits whose right answers are not public

    def rows_of(self, template: str, split: str) -> int | None:
        """How many rows P3 has of a template's split; None where the table does not say."""
        return self.fewer.get(template, {}).get(split, self.rows.get(split))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of the training mixtures."""

    name: str  # as its hub calls it
    subset: str | None  # the same; None where it has none
    mixture: str  # the smallest of `MIXTURES` that trains on it
    train_size: int  # rows that T0's table of data sets gives
    templates: tuple[str, ...]  # names of all its templates, sorted
    original: tuple[bool, ...]  # whether a template asks the data set's own task, for each
    published: Published = dataclasses.field(hash=False)  # what P3 has of it

    source = property(lambda self: (self.name, self.subset, None))  # as `HeldOut.source`

    @property
    def tasks(self) -> tuple[str, ...]:
        """P3's names of its tasks, in the order of the templates."""
        return tuple(task(self.name, self.subset, template) for template in self.templates)

    def cap(self, rule: str) -> int:
        """Examples of each template that count, where a share is `MAX_EXAMPLES` by templates.

        Rule "t0" (T0, MoV): the share if the data set has over `MAX_EXAMPLES` rows, otherwise all.
        Rule "t_few" (T-Few, MHR): the share, or all rows if there are no more.
        """
        share = MAX_EXAMPLES // len(self.templates)
        if rule == "t_few":
            return min(self.train_size, share)
        return share if self.train_size > MAX_EXAMPLES else self.train_size


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A data set that T0 does not train on."""

    name: str  # short, such as "rte" or "anli_r1"
    # Name and subset (or None) as its hub calls them; one of `ANLI_ROUNDS`, None otherwise.
    source: tuple[str, str | None, str | None]
    tasks: tuple[str, ...]  # P3's names of its rank-classification tasks, in template order
    templates: tuple[str, ...]  # names of the templates that ask the original task, sorted
    published: Published = dataclasses.field(hash=False)  # an example once, not once a choice


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A template of a data set, or evaluation set: what one task of P3 is made of."""

    of: Dataset | HeldOut
    number: int  # of the template

    task = property(lambda self: self.of.tasks[self.number])  # P3's name
    template = property(lambda self: self.of.templates[self.number])  # promptsource's name

    # Whether P3 has a row for each of its answer choices.
    is_ranked = property(lambda self: isinstance(self.of, HeldOut))
    # A letter of `Published.choices`; empty where the table does not say.
    choices = property(lambda self: self.of.published.choices[self.number : self.number + 1])

    def rows(self, split: str) -> int | None:
        """Rows that P3 has of it, an example once; None where the table does not say."""
        return self.of.published.rows_of(self.template, split)

    def has_answers(self, split: str) -> bool:
        """Whether P3 has rows of a split, with answers; True where the table does not say."""
        published = self.of.published
        return split not in published.hidden and bool(self.rows(split) or not published.rows)


def task(name: str, subset: str | None, template: str) -> str:
    """P3's name of a (data set, template) task.

    >>> task("super_glue", "copa", "…What could happen next, C1 or C2?")
    'super_glue_copa__What_could_happen_next_C1_or_C2_'
    """
    return re.sub(r"[^\w.]+", "_", f"{name}_{f'{subset}_' if subset else ''}{template}")


@dataclasses.dataclass(frozen=True)
class Table:
    """Data sets in order: their places are their ids."""

    training: tuple[Dataset, ...]  # of all mixtures, those of smaller mixtures first
    held_out: tuple[HeldOut, ...]

    def mixture(self, name: str) -> tuple[Dataset, ...]:
        """The data sets of one of `MIXTURES`; a larger one holds the smaller ones."""
        wanted = MIXTURES[: MIXTURES.index(name) + 1]
        return tuple(dataset for dataset in self.training if dataset.mixture in wanted)

    @functools.cached_property
    def prompts(self) -> Mapping[str, Prompt]:
        """What each task is made of, by P3's name."""
        return {
            task: Prompt(found, number)
            for found in (*self.training, *self.held_out)
            for number, task in enumerate(found.tasks)
        }


@functools.cache
def official() -> Table:
    """T0's 54 training data sets and eleven evaluation sets."""
    text = (importlib.resources.files(__package__) / TABLE_FILE).read_text(encoding="utf-8")
    return _table(json.loads(text))


@functools.cache
def of_folder(folder: pathlib.Path) -> Table:
    """`official()`, unless the folder has a file `tasks.json` of the same form as ours."""
    path = folder / TABLE_FILE
    if not path.is_file():
        return official()
    try:
        return _table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise errors.UserError(
            f"{path} cannot be used ({type(problem).__name__}: {problem}); expected the form of "
            "moe_peft/data/p3/tasks.json."
        ) from problem


def _table(content: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    training = tuple(
        Dataset(
            *(line[key] for key in ("name", "subset", "mixture", "train_size")),
            tuple(line["templates"]),
            tuple(letter == "+" for letter in line.get("original", "")),
            _published(line, line.get("rows", {})),
        )
        for line in content["training"]
    )
    held_out = tuple(found for line in content["held_out"] for found in _sets(line))
    names = [task for dataset in training for task in dataset.tasks]
    names += [task for found in held_out for task in (found.name, *found.tasks)]
    if twice := errors.twice(names):
        raise ValueError(f"{twice!r} is there twice")
    if unknown := [found.mixture for found in training if found.mixture not in MIXTURES]:
        raise ValueError(f"mixture {unknown[0]!r}, expected one of {', '.join(MIXTURES)}")
    return Table(training, held_out)


def _published(line: Mapping[str, Any], rows: Mapping[str, int]) -> Published:
    choices, hidden = line.get("choices", ""), tuple(line.get("hidden", ()))
    return Published(rows, line.get("fewer", {}), choices, line.get("num_choices"), hidden)


def _sets(line: Mapping[str, Any]) -> Iterator[HeldOut]:
    """The evaluation sets of a data set: one, or ANLI's three rounds."""
    name, subset, templates = line["name"], line["subset"], tuple(line["templates"])
    rows = line.get("rows", {})
    for number in ANLI_ROUNDS if name == "anli" else (None,):
        suffix = f"_{number}" if number else ""
        tasks = tuple(f"{task(name, subset, t)}{suffix}_score_eval" for t in templates)
        published = _published(line, rows.get(number, {}) if number else rows)
        yield HeldOut(line["set"] + suffix, (name, subset, number), tasks, templates, published)
