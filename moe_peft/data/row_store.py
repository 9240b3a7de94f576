"""Rows of ids on disk, used as if they were in memory.

Data sets of millions of rows are turned into ids once, task by task, written as plain arrays and
mapped into memory: `pipeline` then reads any row at once, and memory stays flat. What was skipped
on the way (`bad_rows`) is written next to them, and told whenever they are opened.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import struct
import zlib

import numpy as np
import pyarrow

from moe_peft.data import bad_rows, cache, rows

_FORMAT = 4  # another number where the files have another form: they are made again
_SKIPPED = "skipped.json"


@dataclasses.dataclass(frozen=True)
class Line:
    """One example to be stored: ids without end marks."""

    inputs: np.ndarray
    targets: np.ndarray
    answer_choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    task: int | None = None  # which of several tasks it is of; of all lines of a store, or of none


class Texts(Sequence[tuple[str, ...]]):
    """Texts of every row, stored end to end, a JSON list a row, and decoded when asked for."""

    def __init__(self, rows_as_json: rows.Ragged):
        self._rows = rows_as_json

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return tuple(json.loads(self._rows[index].tobytes()))


@dataclasses.dataclass(frozen=True)
class Stored:
    """Columns of one split of one task, and what was skipped when they were made."""

    inputs: rows.Ragged
    targets: rows.Ragged
    answer_choices: Texts
    references: Texts | tuple[()] = ()
    skipped: bad_rows.Counts = dataclasses.field(default_factory=dict)
    tasks: np.ndarray | None = None  # of every row, int32

    def __len__(self) -> int:
        return len(self.inputs)


def stored(
    folder: pathlib.Path, name: str, key: Sequence[object], make: Callable[[], Iterable[Line]]
) -> Stored:
    """The rows called `name`, of a task and split: opened if they are there, otherwise made.

    `key` is all they depend on: another key is another place in `folder`. A task is written whole
    or not at all, so an interrupted run goes on with the next one.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *map(str, key)]).encode()).hexdigest()[:12]
    place = folder / f"{name}-{digest}"
    was_there = place.is_dir()

    def write(temporary: pathlib.Path) -> None:
        logging.info("Reading %s, once; token ids are kept in %s.", name, folder)
        with bad_rows.counting() as skipped:
            _write(temporary, make())
        listed = [[*row, count] for row, count in skipped.items()]
        (temporary / _SKIPPED).write_text(json.dumps(listed), encoding="utf-8")

    cache.write_folder_once(place, write)
    found = _open(place)
    if was_there:
        bad_rows.remember_skipped(found.skipped)
    return found


def draw_answer(accepted: Sequence[str], text: str, seed: int) -> str:
    """One of the accepted answers, drawn once for each seed and text."""
    if len(accepted) == 1:
        return accepted[0]
    generator = np.random.default_rng([seed, zlib.crc32(text.encode())])
    return accepted[generator.integers(len(accepted))]


_WATCHED = 1000  # rows between two calls
_watchers: list[Callable[[int], None]] = []


@contextlib.contextmanager
def watched(tell: Callable[[int], None]) -> Iterator[None]:
    """Inside, `tell(n)` is called whenever some n more rows have been written."""
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)


def _told(lines: Iterable[Line]) -> Iterator[Line]:
    count = 0
    for line in lines:
        yield line
        count += 1
        if count == _WATCHED:
            for tell in _watchers:
                tell(count)
            count = 0
    for tell in _watchers:
        tell(count)


_COLUMNS = {"inputs": np.int32, "targets": np.int32}
_TEXTS = ("answer_choices", "references")
_TASKS = "tasks"
_as_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes one for each row


def _write(place: pathlib.Path, lines: Iterable[Line]) -> None:
    ends = dict.fromkeys((*_COLUMNS, *_TEXTS), 0)
    with contextlib.ExitStack() as stack:
        opened = lambda name: stack.enter_context(open(place / f"{name}.bin", "wb"))
        files = {name: (opened(name), opened(f"{name}_ends")) for name in ends}
        task_file = None
        for line in _told(lines):
            if line.task is not None:
                task_file = task_file or opened(_TASKS)
                task_file.write(struct.pack("=i", line.task))
            items = {name: np.asarray(getattr(line, name), of) for name, of in _COLUMNS.items()}
            for name in _TEXTS:
                items[name] = _as_json(getattr(line, name)).encode()
            for name, item in items.items():
                ends[name] += len(item)
                flat_file, ends_file = files[name]
                flat_file.write(item)
                ends_file.write(struct.pack("=q", ends[name]))


def _open(place: pathlib.Path) -> Stored:
    def mapped(name: str, dtype: type) -> np.ndarray:
        path = place / f"{name}.bin"
        if not path.stat().st_size:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        # Not np.memmap: it keeps a file descriptor for each of thousands of files.
        with pyarrow.memory_map(str(path)) as file:
            return np.frombuffer(file.read_buffer(), dtype)

    def column(name: str) -> rows.Ragged:
        flat = mapped(name, _COLUMNS.get(name, np.uint8))
        return rows.Ragged(flat, mapped(f"{name}_ends", np.int64))

    texts = (Texts(column(name)) for name in _TEXTS)
    listed = json.loads((place / _SKIPPED).read_text(encoding="utf-8"))
    skipped = {(path, reason): count for path, reason, count in listed}
    tasks = mapped(_TASKS, np.int32) if (place / f"{_TASKS}.bin").exists() else None
    return Stored(column("inputs"), column("targets"), *texts, skipped, tasks)
