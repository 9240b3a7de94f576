"""P3's published records, read where they lie, in both published forms.

* TFRecords, a SeqIO cache: `<task>/COMPLETED`, `info.<split>.json`, `stats.<split>.json`,
  `<split>.tfrecord-00000-of-00001` (the repository's revisions until 2023).
* Parquet: `<task>/<split>-00000-of-00001.parquet` or `<task>/<split>/0000.parquet` (from 2024 on).

Both hold texts and T5's token ids; `inputs` without end mark, `targets` with it. Rows of a
`_score_eval` task are one answer choice each, numbered by `idx`, in any order.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import numpy as np

from moe_peft import errors
from moe_peft.data import bad_rows

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(\.parquet|\.jsonl)?$")
_TARGETS_END = 1
_TEXTS = ("inputs_pretokenized", "targets_pretokenized")


@dataclasses.dataclass(frozen=True)
class Record:
    """One row; ids are None where none are published."""

    inputs: str
    targets: str
    input_ids: np.ndarray | None  # no end mark
    target_ids: np.ndarray | None  # end mark taken off
    answer_choices: tuple[str, ...] = ()  # empty where the row has none
    idx: tuple[int, int] | None = None  # (example, choice) in a `_score_eval` task
    is_correct: bool = False  # whether this choice is right, in such a task


def find_folder(root: pathlib.Path, task: str) -> pathlib.Path | None:
    """Where a task's files are, complete or not; None if nowhere."""
    places = (root / "data" / task, root / task)
    return next((folder for folder in places if folder.is_dir()), None)


def task_folder(root: pathlib.Path, task: str) -> pathlib.Path:
    """Where a task's files are; a UserError if nowhere, or not completely."""
    folder = find_folder(root, task)
    if folder is None:
        known = {p.name for place in (root, root / "data") for p in place.glob("*")}
        near = errors.near(task, known)
        raise errors.UserError(f"P3's task {task!r} has no folder in {root}.{near}")
    if any(folder.glob("*.tfrecord-*")) and not (folder / "COMPLETED").exists():
        raise errors.UserError(
            f"{folder} has no file COMPLETED: it was not written, or downloaded, to its end."
        )
    return folder


def split_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of a split in order, all shards of it; empty where there is no such split."""
    patterns = (f"{split}.tfrecord-*", f"{split}-*.parquet", f"{split}/*.parquet")
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return complete(folder, split, found) if found and _published_size(folder, split) != 0 else []


def complete(folder: pathlib.Path, split: str, found: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files of a split as they are; a UserError if shards are missing."""
    numbered = [match for path in found if (match := _SHARD.search(path.name))]
    total = int(numbered[0][2]) if numbered else 0
    if len(numbered) != total:
        raise errors.UserError(f"{folder} has {len(numbered)} of the {total} files of {split!r}.")
    return found


def splits(folder: pathlib.Path) -> tuple[str, ...]:
    """Names of the splits that have rows."""
    names = {
        *(path.name.split(".")[0] for path in folder.glob("*.tfrecord-*")),
        *(path.name.split("-")[0] for path in folder.glob("*-*.parquet")),
        *(path.parent.name for path in folder.glob("*/*.parquet")),
    }
    return tuple(sorted(name for name in names if split_files(folder, name)))


def read(folder: pathlib.Path, split: str) -> Iterator[Record]:
    """Every row of a split; a UserError names the file and the row that is wrong."""
    count = 0
    with bad_rows.counting() as skipped:
        for path in split_files(folder, split):
            rows = parquet_rows(path) if path.suffix == ".parquet" else _tfrecord_rows(path)
            parse = functools.partial(_record, path)
            for record in bad_rows.parsed(parse, enumerate(rows)):
                yield record
                count += 1
    count += sum(skipped.values())
    expected = _published_size(folder, split)
    if expected is not None and count != expected:
        reason = f"{count} rows, stats.{split}.json says {expected}; cut off?"
        bad_rows.skip_row(bad_rows.BadRow(folder, repr(split), reason), max(expected - count, 1))


def _published_size(folder: pathlib.Path, split: str) -> int | None:
    path = folder / f"stats.{split}.json"
    try:
        return int(json.loads(path.read_text())["examples"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise errors.UserError(
            f"{path} cannot be used ({type(problem).__name__}); expected JSON with 'examples'."
        ) from problem


def _record(path: pathlib.Path, numbered: tuple[int, Mapping[str, Any]]) -> Record:
    number, row = numbered
    for name in ("inputs", "targets", *_TEXTS):
        if row.get(name) is None or (name == "targets" and not len(row[name])):
            raise bad_rows.BadRow(path, f"row {number}", f"{name!r} is missing")
    targets = np.asarray(row["targets"], np.int32)
    choices, idx = row.get("answer_choices"), row.get("idx")
    return Record(
        *(row[name] for name in _TEXTS),
        np.asarray(row["inputs"], np.int32),
        targets[:-1] if targets[-1:] == _TARGETS_END else targets,
        tuple(choices) if choices is not None else (),
        (int(idx[0]), int(idx[1])) if idx is not None and len(idx) else None,
        bool(row.get("is_correct")),
    )


def parquet_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every row of a Parquet file, values by column."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        raise errors.UserError(f"{path} cannot be read as Parquet: {problem}.") from problem


def _tfrecord_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    import tensorflow as tf

    ids = tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64)
    texts = tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64)
    features = {
        **dict.fromkeys(("inputs", "targets", "idx", "is_correct"), ids),
        **dict.fromkeys((*_TEXTS, "answer_choices"), texts),
    }
    records = tf.data.TFRecordDataset(str(path))
    damage = (tf.errors.DataLossError, tf.errors.InvalidArgumentError)
    count = 0

    def rows(size: int) -> Iterator[dict[str, Any]]:
        for batch in records.skip(count).batch(size):
            columns = {k: v.numpy() for k, v in tf.io.parse_example(batch, features).items()}
            for i in range(len(columns["inputs"])):
                yield _plain({name: column[i] for name, column in columns.items()})

    for size in (512, 1):  # by single rows after a damaged batch, up to the damage
        try:
            for row in rows(size):
                yield row
                count += 1
            return
        except damage as problem:
            message = problem.message.split("}} ")[-1].split(" [Op:")[0]
    reason = "the file is damaged from here on"
    bad_rows.skip_row(bad_rows.BadRow(path, f"row {count}", reason, message))


def _plain(row: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A row of a TFRecord in the form of one of Parquet."""
    text = lambda name: row[name][0].decode("utf-8") if len(row[name]) else None
    return {
        **{name: row[name] for name in ("inputs", "targets", "idx")},
        **{name: text(name) for name in _TEXTS},
        "answer_choices": [choice.decode("utf-8") for choice in row["answer_choices"]],
        "is_correct": any(row["is_correct"]),
    }
