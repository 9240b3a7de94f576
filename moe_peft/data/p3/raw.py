"""Raw data sets, as their own people publish them: rows that no template has worded yet.

Under one folder, `<data set>/<subset>/`, or `<data set>/` where there is no subset:

* JSON lines or Parquet: `<split>.jsonl`, `<split>-00000-of-00002.parquet`, `<split>/0000.parquet`;
* a folder of TensorFlow Datasets, `[<version>/]features.json` and its records (their folder
  `~/tensorflow_datasets` has this layout);
* StoryCloze's own files, see `storycloze`.

Columns are called as on the hub of data sets, which is what templates expect. ANLI's rounds are
splits (`dev_r1`), as on the hub, or subsets (`anli/r1/`), as in TensorFlow Datasets.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from moe_peft import errors
from moe_peft.data import bad_rows
from moe_peft.data.p3 import records, storycloze

Row = tuple[int, Mapping[str, Any]]  # its number in its file, its values by column


@dataclasses.dataclass(frozen=True)
class Folder:
    """A raw data set on disk."""

    path: pathlib.Path  # of the folder that holds the files
    form: str  # "jsonl", "parquet", "tfds" or "storycloze"
    names: Mapping[str, str] = dataclasses.field(hash=False)  # of splits, by P3's names of them

    def files(self, split: str) -> list[pathlib.Path]:
        """All files of one of P3's splits; empty where there is no such split."""
        return _files(self.path, self.form, self.names[split]) if split in self.names else []

    def read(self, split: str) -> Iterator[tuple[pathlib.Path, Row]]:
        """Every row of one of P3's splits, with its file."""
        if self.form == "tfds":
            return _tfds_rows(self.path, self.names[split])
        return ((path, row) for path in self.files(split) for row in _READERS[self.form](path))


def folder(root: pathlib.Path, name: str, subset: str | None, anli_round: str | None) -> Folder:
    """Where a raw data set is; a UserError that says what is expected if it is nowhere."""
    if not root.is_dir():
        raise errors.UserError(
            f"There is no folder {root}; expected raw data sets, <data set>/<subset>/<split>.jsonl "
            "or .parquet or of TensorFlow Datasets (p3.configured.raw)."
        )
    place = root / name / (subset or "")
    if anli_round and (place / anli_round).is_dir():
        place, anli_round = place / anli_round, None
    if not place.is_dir():
        known = [str(p.relative_to(root)) for p in (*root.glob("*"), *root.glob("*/*"))]
        wanted = f"{name}/{subset}" if subset else name
        raise errors.UserError(
            f"There is no raw data set {place}: expected <split>.jsonl or .parquet in it, or a "
            f"folder of TensorFlow Datasets.{errors.near(wanted, known)}"
        )
    for path in (place, *sorted(place.glob("*.*.*"), reverse=True)):
        if (path / "features.json").is_file():
            return _named(path, "tfds", _tfds_splits(path), anli_round)
    for form in _READERS:
        if found := _splits(place, form):
            return _named(place, form, found, anli_round)
    raise errors.UserError(
        f"{place} has no rows: expected <split>.jsonl, <split>.parquet or features.json in it."
    )


def _named(path: pathlib.Path, form: str, splits: set[str], anli_round: str | None) -> Folder:
    found = {name: name for name in sorted(splits)}
    if anli_round:
        theirs = {"train": "train", "validation": "dev", "test": "test"}
        found = {ours: f"{name}_{anli_round}" for ours, name in theirs.items()}
    return Folder(path, form, {ours: name for ours, name in found.items() if name in splits})


def _splits(folder: pathlib.Path, form: str) -> set[str]:
    if form == "storycloze":
        return storycloze.splits(folder)
    files = {path.stem.split("-")[0] for path in folder.glob(f"*.{form}")}
    return files | {path.parent.name for path in folder.glob(f"*/*.{form}")}


def _files(folder: pathlib.Path, form: str, split: str) -> list[pathlib.Path]:
    if form == "storycloze":
        return storycloze.files(folder, split)
    if form == "tfds":
        return sorted(folder.glob(f"*-{split}.*-*"))
    patterns = (f"{split}.{form}", f"{split}-*.{form}", f"{split}/*.{form}")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return records.complete(folder, split, sorted(found))


def _json_rows(path: pathlib.Path) -> Iterator[Row]:
    def parse(numbered: tuple[int, bytes]) -> Row:
        number, line = numbered
        try:
            values = json.loads(line)
        except ValueError as problem:
            raise bad_rows.BadRow(path, f"row {number}", "not JSON", str(problem)) from problem
        if not isinstance(values, dict):
            raise bad_rows.BadRow(path, f"row {number}", "not a JSON object", str(values)[:80])
        return number, values

    with open(path, "rb") as file:
        lines = (numbered for numbered in enumerate(file) if numbered[1].strip())
        yield from bad_rows.parsed(parse, lines)


_READERS = {
    "jsonl": _json_rows,
    "parquet": lambda path: enumerate(records.parquet_rows(path)),
    "storycloze": storycloze.read,
}


def _tfds_splits(folder: pathlib.Path) -> set[str]:
    path = folder / "dataset_info.json"
    try:
        return {split["name"] for split in json.loads(path.read_text(encoding="utf-8"))["splits"]}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise errors.UserError(
            f"{path} cannot be used ({type(problem).__name__}); expected what TensorFlow Datasets "
            "writes next to its records."
        ) from problem


def _tfds_rows(folder: pathlib.Path, split: str) -> Iterator[tuple[pathlib.Path, Row]]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    count = 0
    try:
        dataset = tfds.builder_from_directory(folder).as_dataset(split, read_config=in_order)
        for row in dataset:
            yield folder, (count, _values(row))
            count += 1
    except (OSError, ValueError, AssertionError, tf.errors.OpError) as problem:
        message = " ".join(str(problem).split())
        raise errors.UserError(f"{folder}, {split!r}, after {count} rows: {message}.") from problem


def _values(value: Any) -> Any:
    """Tensors as what JSON would hold: texts, numbers, lists and mappings of them."""
    if isinstance(value, Mapping):
        return {key: _values(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_values(part) for part in value]
    if hasattr(value, "to_list"):  # ragged
        return _values(value.to_list())
    if hasattr(value, "numpy"):
        value = value.numpy()
        return _values(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
    return value.decode("utf-8") if isinstance(value, bytes) else value
