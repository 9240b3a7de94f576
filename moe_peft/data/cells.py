"""Cells of a user's rows as texts."""

import hashlib
import json
import pathlib
import re

from moe_peft import errors
from moe_peft.data import bad_rows, plain_files


def columns_of(template: str) -> list[str]:
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


def text(path: pathlib.Path, place: str, row: plain_files.Row, column: str) -> str:
    """The text of a cell; numbers are written out."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        reason = f"{column!r} is not a text" if value is not None else f"{column!r} is missing"
        raise bad_rows.BadRow(path, place, reason, "" if value is None else type(value).__name__)
    return str(value)


def texts(
    path: pathlib.Path, place: str, row: plain_files.Row, column: str, is_list: bool = False
) -> tuple[str, ...]:
    """The texts of a cell that may hold a list, or must; in tables a JSON list counts as one."""
    value = row.get(column)
    if isinstance(value, str) and value.startswith("[") and path.suffix in (".csv", ".tsv"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return (value,)
    if is_list and not isinstance(value, list):
        raise bad_rows.BadRow(path, place, f"{column!r} is not a list of texts")
    if not isinstance(value, list):
        return (text(path, place, row, column),)
    if not value:
        raise bad_rows.BadRow(path, place, f"{column!r} is an empty list")
    return tuple(text(path, place, {column: each}, column) for each in value)


def share(text: str) -> float:
    """A number in [0, 1) that the text alone decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
