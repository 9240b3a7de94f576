"""A user's own files as tasks: questions and answers in columns, without SeqIO and TensorFlow."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import types
from typing import Any, NamedTuple

import gin
import numpy as np

from moe_peft import errors
from moe_peft.data import (
    bad_rows,
    cache,
    cells,
    file_places,
    file_tasks,
    plain_files,
    row_store,
    rows,
    vocabularies,
)

TRAIN, VALIDATION = file_places.TRAIN, file_places.VALIDATION
LONGEST = {"inputs": 512, "targets": 128}  # tokens, where nobody says how many
_STEP = 8  # lengths are multiples of it
_ENCODED = 1000  # rows that are made ids together
_opened: dict[tuple[Any, ...], row_store.Stored] = {}


@gin.register(module="data")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Files:
    """Rows of one file or several, read once; their ids are kept in the cache folder.

    A row has a question and an answer; a list of answers are all accepted, and one of them, drawn
    once, trains. A column of choices makes it a question of choosing. A column of tasks makes the
    rows of each name a task, reported and routed by itself.
    """

    # One path, several, a folder, or {split: path or paths}. A folder whose files are called
    # train*, dev*, test*, ... has those splits; of any other, all files are for training.
    data: file_places.Paths | None = dataclasses.field(default=None, metadata=rows.PATH)
    # Whose ids the model reads, as `vocabularies.get` takes it: the backbone's folder, or "bytes".
    vocabulary: str = dataclasses.field(default=vocabularies.BYTES, metadata=rows.PATH)
    # Paths of the split "validation". None: `eval_fraction` of the training rows are kept apart.
    eval_data: file_places.Paths | None = dataclasses.field(default=None, metadata=rows.PATH)
    eval_fraction: float = 0.05  # chosen by a hash of the question; 0 trains on all rows
    inputs_column: str = "inputs"
    targets_column: str = "targets"
    task_column: str = "task"  # may be missing
    choices_column: str = "choices"  # may be missing
    inputs_template: str | None = None  # text with {column} names, instead of `inputs_column`
    # Names of the tasks of a run, in the order of their ids. None: those of the training rows.
    task_names: tuple[str, ...] | None = None
    seed: int = 0  # of the accepted answer that trains

    def __post_init__(self):
        errors.check_between("eval_fraction", self.eval_fraction, 0.0, 0.9)
        if self.task_names is not None:
            object.__setattr__(self, "task_names", tuple(self.task_names))

    def __str__(self) -> str:
        """What results are reported under: the name of the evaluated file, else the first one."""
        files = self.files.get(VALIDATION) or next(iter(self.files.values()), [])
        name = file_places.safe(files[0].stem) if files else "files"
        return f"{name}_held_out" if self.is_held_out else name

    __repr__ = __str__

    @property
    def title(self) -> str:
        """The training files, for people."""
        return ", ".join(path.name for path in self.files.get(TRAIN, ()))

    described = "files"  # in the description of a run, which paths do not shape

    @functools.cached_property
    def files(self) -> dict[str, list[pathlib.Path]]:
        """The files of each split; whether they are there shows when they are read."""
        found = {} if self.data is None else file_places.by_split(self.data, TRAIN)
        if self.eval_data is not None:
            found[VALIDATION] = file_places.by_split(self.eval_data, VALIDATION)[VALIDATION]
        return found

    @functools.cached_property
    def is_held_out(self) -> bool:
        """Whether the validation rows are a part of the training files."""
        return TRAIN in self.files and VALIDATION not in self.files and self.eval_fraction > 0

    @functools.cached_property
    def output_features(self) -> dict[str, Any]:
        """The vocabulary of inputs and targets, as a SeqIO task has it, and `task_ids` if any."""
        text = types.SimpleNamespace(vocabulary=vocabularies.get(self.vocabulary))
        ids = {"task_ids": None} if self.has_tasks else {}
        return {"inputs": text, "targets": text, **ids}

    @functools.cached_property
    def has_tasks(self) -> bool:
        """Whether rows are told apart by a column."""
        if self.task_names is not None:
            return True
        files = [path for paths in self.files.values() for path in paths]
        # A run is evaluated where its training files may no longer be.
        there = [path for path in files if path.is_file()] or files
        if there and self.task_column != type(self).task_column:  # somebody named it
            cells.check_columns(there[0], {"--task_column": [self.task_column]})
        return bool(there) and self.task_column in plain_files.first(there[0])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their ids; those of no training row come last."""
        if not self.has_tasks:
            return (str(self),)
        of = {s: file_tasks.names_in(f, self.task_column) for s, f in self.files.items()}
        known = list(self.task_names or of.get(TRAIN, ()))
        known += sorted(set().union(*of.values()).difference(known))
        if twice := errors.twice(map(file_places.safe, known)):
            raise errors.UserError(
                f"Several tasks in the column {self.task_column!r} are reported as {twice!r}; give "
                "them names with other letters, digits, dots or hyphens."
            )
        return tuple(known)

    @functools.cached_property
    def tasks(self) -> list[file_tasks.Task]:
        """The tasks in the order of their ids."""
        return [file_tasks.Task(self, number, name) for number, name in enumerate(self.names)]

    def get_rate(self, task: file_tasks.Task) -> float:
        """Its training rows: every row of the mixture is drawn equally often."""
        return float(task.num_input_examples(TRAIN))

    def asking(self) -> dict[str, Any]:
        """What somebody needs to ask a model that these rows have trained, as fields of this."""
        fields = ("vocabulary", "inputs_column", "targets_column", "task_column", "choices_column")
        found = {name: getattr(self, name) for name in (*fields, "inputs_template")}
        return found | ({"task_names": self.names} if self.has_tasks else {})

    def itself(self) -> "Files":
        """The settings that shape the rows."""
        return self

    def stored(self, split: str) -> row_store.Stored | None:
        """All rows of a split as ids; None where there is no such split."""
        if split not in self._stored:
            files = self.files.get(TRAIN if split == VALIDATION and self.is_held_out else split)
            self._stored[split] = files and self._store(split, files)
        return self._stored[split]

    def num_unspelled(self) -> int:
        """Training answers with a piece that the vocabulary does not know."""
        targets = self.stored(TRAIN).targets
        unknown = np.flatnonzero(targets.flat == vocabularies.get(self.vocabulary).unk_id)
        return len(np.unique(np.searchsorted(targets.ends, unknown, side="right")))

    def lengths(self) -> dict[str, int]:
        """Tokens of inputs and targets that the longest rows need, up to `LONGEST`."""
        found = map(rounded, self.longest())
        return {n: min(own, most) for (n, most), own in zip(LONGEST.items(), found, strict=True)}

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest inputs and of the longest targets, end marks included."""
        stored = [each for each in map(self.stored, (*self.files, VALIDATION)) if each]
        most = lambda columns: 1 + max(int(each.lengths.max(initial=0)) for each in columns)
        return most([each.inputs for each in stored]), most([each.targets for each in stored])

    @functools.cached_property
    def _stored(self) -> dict[str, row_store.Stored | None]:
        return {}

    def _store(self, split: str, files: Sequence[pathlib.Path]) -> row_store.Stored:
        self.check_columns(files)
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata != rows.PATH and field.name != "task_names"
        }
        is_held_out = self.is_held_out and split in (TRAIN, VALIDATION)
        key = [vocabularies.fingerprint(self.vocabulary), bad_rows.is_skipping(), is_held_out]
        key += [split, sorted(settings.items()), self.names if self.has_tasks else ()]
        key += file_places.sign(files)
        make = functools.partial(self._lines, split, is_held_out)
        name = f"{file_places.safe(str(self))}-{split}"
        # Others of the same settings are made in one run: what was skipped counts once.
        known = (cache.folder(), name, str(key))
        if known not in _opened:
            _opened[known] = row_store.stored(cache.folder() / "files", name, key, make)
        return _opened[known]

    def _lines(self, split: str, is_held_out: bool) -> Iterator[row_store.Line]:
        vocabulary = vocabularies.get(self.vocabulary)
        examples = self.examples(TRAIN if is_held_out else split)
        # A bad row has no side: it counts among those of training, and once.
        counted_before = is_held_out and split != TRAIN and bad_rows.is_skipping()
        with bad_rows.uncounted() if counted_before else contextlib.nullcontext():
            if is_held_out:
                is_apart = lambda each: cells.share(each.question.inputs) < self.eval_fraction
                examples = (each for each in examples if is_apart(each) == (split != TRAIN))
            while part := list(itertools.islice(examples, _ENCODED)):
                inputs = vocabulary.encode_all([each.question.inputs for each in part])
                targets = vocabulary.encode_all([each.targets for each in part])
                for each, *ids in zip(part, inputs, targets, strict=True):
                    asked, accepted = each.question, each.references
                    if (spelled := vocabulary.decode(ids[1])) not in accepted:
                        # White space and the like; what it cannot spell stays a wrong answer.
                        accepted += (spelled,) * (vocabulary.unk_id not in ids[1])
                    ids = (np.asarray(of, np.int32) for of in ids)
                    yield row_store.Line(*ids, asked.choices, accepted, asked.task)

    def examples(self, split: str) -> Iterator["Example"]:
        """The rows of the files of a split that can be read, see `bad_rows`."""
        return bad_rows.parsed(self._example, plain_files.read_all(self.files[split]))

    def question(self, path: pathlib.Path, place: str, row: plain_files.Row) -> "Question":
        """The question of a row; `path` and `place` are where it is, for messages."""
        text = functools.partial(cells.text, path, place, row)
        if self.inputs_template is None:
            inputs = text(self.inputs_column)
        else:
            inputs = cells.filled(self.inputs_template, text)
        choices = ()
        if row.get(self.choices_column):
            choices = cells.texts(path, place, row, self.choices_column, is_list=True)
        task = None
        if self.has_tasks and row.get(self.task_column) is not None:
            name = text(self.task_column)
            if name not in self._numbers:
                near = errors.near(name, self.names)
                seen = f"{name!r}.{near}" if near else repr(name)
                raise bad_rows.BadRow(path, place, "the task was not trained", seen)
            task = self._numbers[name]
        return Question(inputs, choices, task)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def _example(self, record) -> "Example":
        path, place, row = record
        question = self.question(path, place, row)
        if self.has_tasks and question.task is None:
            raise bad_rows.BadRow(path, place, f"{self.task_column!r} is missing")
        accepted = cells.texts(path, place, row, self.targets_column)
        if not all(accepted):
            raise bad_rows.BadRow(path, place, f"{self.targets_column!r} is empty")
        choices = question.choices
        if choices and (absent := [answer for answer in accepted if answer not in choices]):
            reason = "the answer is not among the choices"
            raise bad_rows.BadRow(path, place, reason, f"{absent[0]!r}, {list(choices)}")
        targets = row_store.draw_answer(accepted, question.inputs, self.seed)
        return Example(question, targets, accepted, path, place)

    def check_columns(self, files: Sequence[pathlib.Path]) -> None:
        """Raises UserError for a column that is not in the first row of a file."""
        wanted = {"--targets_column": [self.targets_column]}
        if self.inputs_template is None:
            wanted["--inputs_column"] = [self.inputs_column]
        else:
            wanted["--inputs_template"] = cells.columns_of(self.inputs_template)
        for path in files:
            cells.check_columns(path, wanted)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked in one row."""

    inputs: str
    choices: tuple[str, ...] = ()  # empty where the answer is free text
    task: int | None = None  # id; None where the row names none


class Example(NamedTuple):
    """A row."""

    question: Question
    targets: str  # the answer that trains
    references: tuple[str, ...]  # every accepted answer
    path: pathlib.Path
    place: str


def lengths_of(mixture: Any) -> dict[str, int]:
    """`Files.lengths`; of a SeqIO mixture, which is not read as a whole, the most."""
    return mixture.lengths() if isinstance(mixture, Files) else dict(LONGEST)


def rounded(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // _STEP) * _STEP
