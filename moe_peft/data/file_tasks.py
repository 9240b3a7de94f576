"""The rows of one name in a user's files, as a task with what is used of a SeqIO task."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from moe_peft.data import bad_rows, cache, cells, file_places, plain_files, rows


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The rows of one task; a source and a task in one."""

    files: Any  # the `files.Files` that it is of
    number: int  # its id
    full_name: str

    name = property(lambda self: file_places.safe(self.full_name))
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
        return filter(
            self.__contains__, dict.fromkeys((*self._task.files.files, file_places.VALIDATION))
        )


def names_in(files: Sequence[pathlib.Path], column: str) -> list[str]:
    """Names in the column of tasks, sorted, read once and for all; none where a file is missing."""
    if not all(path.is_file() for path in files):
        return []
    name_of = lambda record: cells.text(*record, column)

    def write(folder: pathlib.Path) -> None:
        with bad_rows.uncounted():
            found = set(bad_rows.parsed(name_of, plain_files.read_all(files)))
        (folder / "names.json").write_text(json.dumps(sorted(found)), encoding="utf-8")

    digest = hashlib.sha256(json.dumps([file_places.sign(files), column]).encode())
    place = cache.folder() / "files" / f"tasks-{digest.hexdigest()[:12]}"
    cache.write_folder_once(place, write)
    return json.loads((place / "names.json").read_text(encoding="utf-8"))
