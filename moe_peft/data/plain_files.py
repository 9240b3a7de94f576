"""Rows of .jsonl, .csv, .tsv and .parquet files, one by one, whatever their size."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import csv
import json
import pathlib
from typing import Any

import pyarrow
from pyarrow import parquet

from moe_peft import errors
from moe_peft.data import bad_rows

Row = dict[str, Any]  # by column
Place = str  # which row of its file, for messages

_FIELD_BYTES = 1 << 24  # longest text of a CSV cell


def read(path: pathlib.Path) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a file and their places, blank lines left out.

    A row that cannot be read is a `bad_rows.BadRow`: it stops, or is skipped and counted. Raises
    UserError: the file is missing, of an unknown kind, or cannot be read at all.
    """
    check(path)
    try:
        yield from _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise errors.UserError(f"{path} is not UTF-8 text: {error.reason}.") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise errors.UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def read_all(paths: Iterable[pathlib.Path]) -> Iterator[tuple[pathlib.Path, Place, Row]]:
    """`read` of one file after another."""
    return ((path, *record) for path in paths for record in read(path))


def check(path: pathlib.Path) -> None:
    """Raises UserError unless the path is a file of a known kind that has something in it."""
    if path.is_dir():
        raise errors.UserError(f"The file {path} is a folder.")
    if not path.is_file():
        folder = path.parent
        near = errors.near(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
        raise errors.UserError(f"The file {path} is not there.{near}")
    errors.check_one_of(f"The ending of {path}", path.suffix, _READERS)
    if not path.stat().st_size:
        raise errors.UserError(f"The file {path} is empty; expected rows with inputs and targets.")


def first(path: pathlib.Path) -> Row:
    """The first row that can be read; a UserError if there is none."""
    with bad_rows.uncounted():
        for _, row in read(path):
            return row
    raise errors.UserError(
        f"{path} has no row that can be read; expected {_EXPECTED[path.suffix]}."
    )


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[Place, Row]]:
    def parsed(numbered: tuple[int, str]) -> tuple[Place, Row] | None:
        number, line = numbered
        place = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            seen = str(getattr(error, "msg", error))
            raise bad_rows.BadRow(path, place, "not JSON", seen) from None
        if not isinstance(row, dict):
            raise bad_rows.BadRow(path, place, "not a JSON object", type(row).__name__)
        return place, row

    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        yield from bad_rows.parsed(parsed, lines)


def _read_table(delimiter: str) -> Callable[[pathlib.Path], Iterator[tuple[Place, Row]]]:
    def read_table(path: pathlib.Path) -> Iterator[tuple[Place, Row]]:
        csv.field_size_limit(_FIELD_BYTES)
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, delimiter=delimiter, strict=True)
            lines = filter(None, _with_line(path, cells))
            header = next(lines, [])
            if twice := errors.twice(header):
                raise errors.UserError(f"{path}: two columns are called {twice!r}.")

            def parsed(row: list[str]) -> tuple[Place, Row]:
                place = f"line {cells.line_num}"
                if len(row) != len(header):
                    reason = f"not the {len(header)} cells of the header"
                    raise bad_rows.BadRow(path, place, reason, str(len(row)))
                return place, dict(zip(header, row, strict=True))

            yield from bad_rows.parsed(parsed, lines)

    return read_table


def _with_line(path: pathlib.Path, cells) -> Iterator[list[str]]:
    # Not a bad row to skip: after a quote that never closes, the rest of the file would be it.
    first = 1
    try:
        for row in cells:
            yield row
            first = cells.line_num + 1
    except csv.Error as error:
        raise errors.UserError(f"{path}, row at line {first}: cannot be read: {error}.") from error


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[Place, Row]]:
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


_READERS: Mapping[str, Callable[[pathlib.Path], Iterator[tuple[Place, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
_EXPECTED = {
    ".jsonl": 'a JSON object a line, such as {"inputs": "...", "targets": "..."}',
    ".csv": "a header and rows with commas between the cells",
    ".tsv": "a header and rows with tabs between the cells",
    ".parquet": "rows",
}
