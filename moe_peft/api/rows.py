"""Rows and paths that a caller in Python gives, as `data.files.Files`."""

from collections.abc import Iterable, Mapping
import os
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.runtime import json_files

Rows = Iterable[Mapping[str, Any] | tuple[str, str]]


def on_disk(given: Any, folder: pathlib.Path, name: str) -> Any:
    """Paths as they are; rows as the file that they are written to."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    if isinstance(given, Mapping):
        return {split: on_disk(each, folder, split) for split, each in given.items()}
    rows = list(given)
    if rows and all(isinstance(row, str | os.PathLike) for row in rows):
        return [os.fspath(row) for row in rows]
    path = folder / "data" / f"{name}.jsonl"
    json_files.write_jsonl(path, [_as_row(number, row) for number, row in enumerate(rows, 1)])
    return str(path)


def _as_row(number: int, row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, tuple | list) and len(row) == 2:
        return dict(zip(("inputs", "targets"), row, strict=True))
    raise errors.UserError(
        f"Row {number} is {str(row)[:60]!r}; expected a dictionary or a pair (inputs, targets)."
    )
