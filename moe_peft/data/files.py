"""A user's own files as tasks: questions and answers in columns, without SeqIO and TensorFlow."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import types
from typing import Any

import gin
import numpy as np

from moe_peft import errors
from moe_peft.data import bad_rows, cache, plain_files, row_store, rows, vocabularies

TRAIN, VALIDATION = "train", "validation"
Paths = str | Sequence[str] | Mapping[str, Any]

_ENCODED = 1000  # rows that are made ids together
# Beginnings of the names of files in a folder that say which split they are.
_SPLITS = {TRAIN: ("train",), VALIDATION: ("validation", "valid", "dev", "eval"), "test": ("test",)}
_FLAGS = {"inputs_column": "--inputs_column", "targets_column": "--targets_column"}


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
    data: Paths | None = dataclasses.field(default=None, metadata=rows.PATH)
    # Whose ids the model reads, as `vocabularies.get` takes it: the backbone's folder, or "bytes".
    vocabulary: str = dataclasses.field(default=vocabularies.BYTES, metadata=rows.PATH)
    # Paths of the split "validation". None: `eval_fraction` of the training rows are kept apart.
    eval_data: Paths | None = dataclasses.field(default=None, metadata=rows.PATH)
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
        return _safe(files[0].stem) if files else "files"

    __repr__ = __str__

    @property
    def title(self) -> str:
        """The training files, for people."""
        return ", ".join(path.name for path in self.files.get(TRAIN, ()))

    described = "files"  # in the description of a run, which paths do not shape

    @functools.cached_property
    def files(self) -> dict[str, list[pathlib.Path]]:
        """The files of each split; whether they are there shows when they are read."""
        found = {} if self.data is None else _by_split(self.data, TRAIN)
        if self.eval_data is not None:
            found[VALIDATION] = _by_split(self.eval_data, VALIDATION)[VALIDATION]
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
        return bool(there) and self.task_column in plain_files.first(there[0])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their ids; those of no training row come last."""
        if not self.has_tasks:
            return (str(self),)
        known = list(self.task_names or self.names_in(TRAIN))
        others = (self.names_in(split) for split in self.files if split != TRAIN)
        known += sorted({name for names in others for name in names}.difference(known))
        return tuple(known)

    def names_in(self, split: str) -> list[str]:
        """Names in the column of tasks, sorted; the files are read once and for all."""
        if not all(path.is_file() for path in self.files.get(split, ())):
            return []

        def write(folder: pathlib.Path) -> None:
            with bad_rows.uncounted():
                found = {str(row.get(self.task_column)) for _, _, row in self._records(split)}
            (folder / "names.json").write_text(json.dumps(sorted(found)), encoding="utf-8")

        digest = hashlib.sha256(json.dumps([_sign(self.files[split]), self.task_column]).encode())
        place = cache.folder() / "files" / f"tasks-{digest.hexdigest()[:12]}"
        cache.write_folder_once(place, write)
        return json.loads((place / "names.json").read_text(encoding="utf-8"))

    @functools.cached_property
    def tasks(self) -> list["Task"]:
        """The tasks in the order of their ids."""
        return [Task(self, number, name) for number, name in enumerate(self.names)]

    def get_rate(self, task: "Task") -> float:
        """Its training rows: every row of the mixture is drawn equally often."""
        return float(task.num_input_examples(TRAIN))

    def itself(self) -> "Files":
        """The settings that shape the rows."""
        return self

    def stored(self, split: str) -> row_store.Stored | None:
        """All rows of a split as ids; None where there is no such split."""
        if split not in self._stored:
            files = self.files.get(TRAIN if split == VALIDATION and self.is_held_out else split)
            self._stored[split] = files and self._store(split, files)
        return self._stored[split]

    @property
    def num_held_out(self) -> int:
        """Training rows that are kept apart."""
        return len(self.stored(VALIDATION)) if self.is_held_out else 0

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest inputs and of the longest targets, end marks included."""
        stored = [each for each in map(self.stored, (*self.files, VALIDATION)) if each]
        most = lambda columns: 1 + max(int(each.lengths.max(initial=0)) for each in columns)
        return most([each.inputs for each in stored]), most([each.targets for each in stored])

    @functools.cached_property
    def _stored(self) -> dict[str, row_store.Stored | None]:
        return {}

    def _store(self, split: str, files: Sequence[pathlib.Path]) -> row_store.Stored:
        self._check_columns(files)
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata != rows.PATH and field.name != "task_names"
        }
        is_held_out = self.is_held_out and split in (TRAIN, VALIDATION)
        key = [vocabularies.fingerprint(self.vocabulary), bad_rows.is_skipping(), is_held_out]
        key += [split, sorted(settings.items()), self.names if self.has_tasks else ()]
        key += _sign(files)
        make = functools.partial(self._lines, split, is_held_out)
        return row_store.stored(cache.folder() / "files", f"{_safe(str(self))}-{split}", key, make)

    def _records(self, split: str) -> Iterator[tuple[pathlib.Path, str, plain_files.Row]]:
        for path in self.files[split]:
            for place, row in plain_files.read(path):
                yield path, place, row

    def _lines(self, split: str, is_held_out: bool) -> Iterator[row_store.Line]:
        vocabulary = vocabularies.get(self.vocabulary)
        numbers = {name: number for number, name in enumerate(self.names)}
        source = TRAIN if is_held_out else split
        examples = bad_rows.parsed(self._example, self._records(source))
        if is_held_out:
            is_wanted = lambda inputs: (_share(inputs) < self.eval_fraction) == (split != TRAIN)
            examples = (example for example in examples if is_wanted(example[0]))
        for part in _parts(examples, _ENCODED):
            texts = vocabulary.encode_all([text for example in part for text in example[:2]])
            for i, (_, _, accepted, choices, name) in enumerate(part):
                ids = (np.asarray(each, np.int32) for each in texts[2 * i : 2 * i + 2])
                task = numbers[name] if self.has_tasks else None
                yield row_store.Line(*ids, choices, accepted, task)

    def _example(self, record) -> tuple[str, str, tuple[str, ...], tuple[str, ...], str]:
        """(question, answer, accepted answers if several, choices, name of the task)."""
        path, place, row = record
        text = functools.partial(_text, path, place)
        if self.inputs_template is None:
            inputs = text(row, self.inputs_column)
        else:
            columns = _columns_of(self.inputs_template)
            inputs = self.inputs_template.format(**{name: text(row, name) for name in columns})
        accepted = _texts(path, place, row, self.targets_column)
        choices = ()
        if row.get(self.choices_column):
            choices = _texts(path, place, row, self.choices_column)
            if absent := [answer for answer in accepted if answer not in choices]:
                reason = "the answer is not among the choices"
                raise bad_rows.BadRow(path, place, reason, f"{absent[0]!r}, {list(choices)}")
        if not all(accepted):
            raise bad_rows.BadRow(path, place, f"{self.targets_column!r} is empty")
        name = text(row, self.task_column) if self.has_tasks else ""
        targets = row_store.draw_answer(accepted, inputs, self.seed)
        return inputs, targets, accepted if len(accepted) > 1 else (), choices, name

    def _check_columns(self, files: Sequence[pathlib.Path]) -> None:
        """Raises UserError for a column that is not in the first row of a file."""
        wanted = {"--targets_column": [self.targets_column]}
        if self.inputs_template is None:
            wanted["--inputs_column"] = [self.inputs_column]
        else:
            wanted["--inputs_template"] = _columns_of(self.inputs_template)
        for path in files:
            have = list(plain_files.first(path))
            for flag, name in ((flag, name) for flag, names in wanted.items() for name in names):
                if name not in have:
                    raise errors.UserError(
                        f"{path} has no column {name!r}; it has {', '.join(map(repr, have))}."
                        f"{errors.near(name, have)} Name the column with {flag}."
                    )


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The rows of one task, with what is used of a SeqIO task."""

    files: Files
    number: int  # its id
    full_name: str

    name = property(lambda self: _safe(self.full_name))
    source = property(lambda self: self)  # a source and a task in one
    settings = property(lambda self: self.files.itself)
    reporting = property(lambda self: rows.Reporting(group=self.full_name))
    output_features = property(lambda self: self.files.output_features)

    @property
    def splits(self) -> "_Splits":
        """Those in which it has rows; a split is read when somebody asks for it."""
        return _Splits(self)

    def num_input_examples(self, split: str) -> int:
        """Rows of a split."""
        return len(self.rows(split)) if self.files.stored(split) else 0

    @functools.cache  # noqa: B019 - lives as long as the files
    def rows(self, split: str) -> rows.Rows:
        """Rows of a split, mapped from the cache."""
        found = self.files.stored(split)
        inputs, targets, scalars = found.inputs, found.targets, {}
        choices, references = found.answer_choices, found.references
        if found.tasks is not None:
            places = np.flatnonzero(found.tasks == self.number).astype(np.uint32)
            inputs, targets, choices, references = (
                rows.Picked(column, places) for column in (inputs, targets, choices, references)
            )
            scalars = {"task_ids": np.broadcast_to(np.int32(self.number), (len(places),))}
        return rows.Rows(inputs, targets, scalars, choices, references)


class _Splits:
    def __init__(self, task: Task):
        self._task = task

    def __contains__(self, split: str) -> bool:
        return self._task.num_input_examples(split) > 0

    def __iter__(self) -> Iterator[str]:
        return filter(self.__contains__, dict.fromkeys((*self._task.files.files, VALIDATION)))


def _by_split(data: Paths, default: str) -> dict[str, list[pathlib.Path]]:
    """Files by split; those that name none are of `default`."""
    if isinstance(data, Mapping):
        given = {split: _by_split(paths, split)[split] for split, paths in data.items()}
        if unknown := set(given) - set(_SPLITS):
            errors.check_one_of("A split of data", sorted(unknown)[0], _SPLITS)
        return given
    found: dict[str, list[pathlib.Path]] = {}
    for path in map(pathlib.Path, [data] if isinstance(data, str) else data):
        path = path.expanduser()
        if not path.is_dir():
            found.setdefault(default, []).append(path)
            continue
        inside = sorted(each for each in path.iterdir() if each.suffix in plain_files.SUFFIXES)
        if not inside:
            expected = ", ".join(plain_files.SUFFIXES)
            raise errors.UserError(f"The folder {path} has no file that ends in {expected}.")
        splits = [_split_of(each) for each in inside]
        for each, split in zip(inside, splits, strict=True):
            own = (split or default) if default == TRAIN and TRAIN in splits else default
            found.setdefault(own, []).append(each)
    return found


def _split_of(path: pathlib.Path) -> str | None:
    stems = ((split, stem) for split, stems in _SPLITS.items() for stem in stems)
    return next((split for split, stem in stems if path.stem.startswith(stem)), None)


def _columns_of(template: str) -> list[str]:
    """Names in braces; a UserError where there are none, or where the braces do not match."""
    found = re.findall(r"\{([^{}]+)\}", template)
    try:
        template.format(**dict.fromkeys(found, ""))
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise errors.UserError(
            f"The template {template!r} cannot be filled in ({error}); expected names of columns "
            "in braces, as in 'Question: {question}', and doubled braces elsewhere."
        ) from error
    if not found:
        raise errors.UserError(f"The template {template!r} names no column in braces.")
    return list(dict.fromkeys(found))


def _text(path: pathlib.Path, place: str, row: plain_files.Row, column: str) -> str:
    """The text of a cell; numbers are written out."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        reason = f"{column!r} is not a text" if value is not None else f"{column!r} is missing"
        raise bad_rows.BadRow(path, place, reason, "" if value is None else type(value).__name__)
    return str(value)


def _texts(path: pathlib.Path, place: str, row: plain_files.Row, column: str) -> tuple[str, ...]:
    """The texts of a cell that may hold a list; in tables a JSON list counts as one."""
    value = row.get(column)
    if isinstance(value, str) and value.startswith("[") and path.suffix in (".csv", ".tsv"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return (value,)
    if not isinstance(value, list):
        return (_text(path, place, row, column),)
    if not value:
        raise bad_rows.BadRow(path, place, f"{column!r} is an empty list")
    return tuple(_text(path, place, {column: each}, column) for each in value)


def _share(text: str) -> float:
    """A number in [0, 1) that the text alone decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def _parts(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    part = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _sign(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int]]:
    """What tells when a file was changed."""
    stats = ((path.resolve(), path.stat()) for path in files)
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _safe(name: str) -> str:
    """The name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name) or "_"
