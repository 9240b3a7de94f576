"""Cells of a user's rows as texts."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import hashlib
import json
import pathlib
import string

from moe_peft import errors
from moe_peft.data import bad_rows, plain_files


def columns_of(template: str) -> list[str]:
    """Names in braces; a UserError where there are none, or where the braces do not match."""
    found = list(dict.fromkeys(name for _, name in _parts_of(template) if name is not None))
    if not found:
        raise errors.UserError(f"The template {template!r} names no column in braces.")
    return found


def filled(template: str, text: Callable[[str], str]) -> str:
    """The template with the text of each column that it names."""
    parts = _parts_of(template)
    return "".join(before + ("" if name is None else text(name)) for before, name in parts)


@functools.cache
def _parts_of(template: str) -> list[tuple[str, str | None]]:
    """(text, column behind it or None); names may have dots, which `str.format` would read."""
    try:
        found = list(string.Formatter().parse(template))
        if any(name == "" or spec or kind for _, name, spec, kind in found):
            raise ValueError("braces hold the name of a column and nothing else")
    except ValueError as error:
        raise errors.UserError(
            f"The template {template!r} cannot be filled in ({error}); expected names of columns "
            "in braces, as in 'Question: {question}', and doubled braces elsewhere."
        ) from error
    return [(before, name) for before, name, *_ in found]


def check_columns(path: pathlib.Path, wanted: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a column, by the flag that names it, that the first row lacks."""
    have = list(plain_files.first(path))
    for flag, name in ((flag, name) for flag, names in wanted.items() for name in names):
        if name not in have:
            raise errors.UserError(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, have))}."
                f"{errors.near(name, have)} Name the column with {flag}."
            )


def text(path: pathlib.Path, place: str, row: plain_files.Row, column: str) -> str:
    """The text of a cell; numbers are written out."""
    value = row.get(column)
    if isinstance(value, str):
        if half := half_character(value):
            raise bad_rows.BadRow(path, place, f"{column!r} has half a character", half)
        return value
    if value is None or value != value:  # NaN, as pandas writes what is missing
        raise bad_rows.BadRow(path, place, f"{column!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_rows.BadRow(path, place, f"{column!r} is not a text", type(value).__name__)
    return str(value)


def half_character(text: str) -> str:
    """The first half of a surrogate pair, which no tokenizer reads, as ASCII; "" if there is none.

    >>> half_character("a" + chr(0xD800)), half_character("a")
    ("'\\\\ud800'", '')
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return ""


def texts(
    path: pathlib.Path, place: str, row: plain_files.Row, column: str, is_list: bool = False
) -> tuple[str, ...]:
    """The texts of a cell that may hold a list, or must; in tables a JSON list counts as one."""
    value = row.get(column)
    if isinstance(value, str) and value.startswith("[") and path.suffix in (".csv", ".tsv"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if is_list and not isinstance(value, list):
        raise bad_rows.BadRow(path, place, f"{column!r} is not a list of texts")
    if not isinstance(value, list):
        return (text(path, place, {column: value}, column),)
    if not value:
        raise bad_rows.BadRow(path, place, f"{column!r} is an empty list")
    return tuple(text(path, place, {column: each}, column) for each in value)


def share(text: str) -> float:
    """A number in [0, 1) that the text alone decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
