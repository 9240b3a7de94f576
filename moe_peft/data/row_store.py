"""Rows of ids on disk, used as if they were in memory.

Data sets of millions of rows are turned into ids once, task by task, written as plain arrays and
mapped into memory: `pipeline` then reads any row at once, and memory stays flat.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile

import numpy as np

from moe_peft.data import rows

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Line:
    """One example to be stored: ids without end marks."""

    inputs: np.ndarray
    targets: np.ndarray
    answer_choices: tuple[str, ...] = ()


class Texts(Sequence[tuple[str, ...]]):
    """Texts of every row, stored as UTF-8 end to end and decoded when asked for."""

    def __init__(self, texts: rows.Ragged, ends: np.ndarray):
        """Args: `texts` one sequence of bytes a text; `ends` where each row's texts end."""
        self._texts, self._ends = texts, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        start = self._ends[index - 1] if index else 0
        return tuple(
            self._texts[i].astype(np.uint8).tobytes().decode("utf-8")
            for i in range(start, self._ends[index])
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """Columns of one split of one task."""

    inputs: rows.Ragged
    targets: rows.Ragged
    answer_choices: Texts

    def __len__(self) -> int:
        return len(self.inputs)


def stored(
    folder: pathlib.Path, name: str, key: Sequence[object], make: Callable[[], Iterable[Line]]
) -> Stored:
    """The rows called `name`: opened if they are there, otherwise made and written.

    Written beside their place and renamed, so that half of a task is never read; what is done is
    not done again after an interruption.

    Args:
      folder: of all rows.
      name: of the task and split, part of the file's name.
      key: whatever the rows depend on; another key is another file.
      make: yields the rows; memory does not grow with their number.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *map(str, key)]).encode()).hexdigest()[:12]
    place = folder / f"{name}-{digest}"
    if not place.is_dir():
        logging.info("Reading %s, once; token ids are kept in %s.", name, folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=folder, suffix=".tmp"))
        try:
            _write(temporary, make())
            os.replace(temporary, place)
        except OSError:
            if not place.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _open(place)


_COLUMNS = {"inputs": np.int32, "targets": np.int32, "choices": np.uint8}


def _write(place: pathlib.Path, lines: Iterable[Line]) -> None:
    ends: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    totals = dict.fromkeys(_COLUMNS, 0)
    choice_ends = []
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(place / f"{n}.bin", "wb")) for n in _COLUMNS}
        for line in lines:
            choices = [np.frombuffer(c.encode("utf-8"), np.uint8) for c in line.answer_choices]
            for name, sequences in (
                ("inputs", [line.inputs]),
                ("targets", [line.targets]),
                ("choices", choices),
            ):
                for sequence in sequences:
                    files[name].write(np.asarray(sequence, _COLUMNS[name]).tobytes())
                    totals[name] += len(sequence)
                    ends[name].append(totals[name])
            choice_ends.append(len(ends["choices"]))
    for name, values in ends.items():
        np.save(place / f"{name}_ends.npy", np.array(values, np.int64))
    np.save(place / "rows_ends.npy", np.array(choice_ends, np.int64))


def _open(place: pathlib.Path) -> Stored:
    def column(name: str) -> rows.Ragged:
        path, dtype = place / f"{name}.bin", _COLUMNS[name]
        # An empty file cannot be mapped.
        flat = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        return rows.Ragged(flat, np.load(place / f"{name}_ends.npy", mmap_mode="r"))

    choices = Texts(column("choices"), np.load(place / "rows_ends.npy", mmap_mode="r"))
    return Stored(column("inputs"), column("targets"), choices)
