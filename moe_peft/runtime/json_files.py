"""Predictions as JSON lines: one object per example, written whole or not at all."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from moe_peft import errors


def write_jsonl(path: pathlib.Path | str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object per line, in UTF-8; returns how many.

    The file appears under its name when all of it is on disk: a run that stops in the middle, for
    whatever reason, leaves what was there before.
    """
    return _write_atomically(pathlib.Path(path), map(_dump, rows))


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """Writes one indented JSON document, atomically like `write_jsonl`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    _write_atomically(pathlib.Path(path), [text])


def write_text(path: pathlib.Path | str, text: str) -> None:
    """Writes a text, atomically like `write_jsonl`."""
    _write_atomically(pathlib.Path(path), [text.rstrip("\n")])


def check_writable(folder: pathlib.Path | str) -> None:
    """Makes a folder and tries to write into it; raises UserError before work is done in vain."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise errors.UserError(f"Cannot write to {folder}: {error.strerror}.") from error


def read_jsonl(path: pathlib.Path | str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; blank lines are skipped.

    Raises UserError naming the line that is not a JSON object, or the file that cannot be read.
    """
    path = pathlib.Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            # Not str.splitlines: it also splits at characters that JSON allows inside strings.
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise errors.UserError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise errors.UserError(f"{where} is not a JSON object but {type(row).__name__}.")
    return row


def _dump(row: Mapping[str, Any]) -> str:
    """Readable characters; escapes only where UTF-8 cannot write them (lone surrogates)."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False)
    return text


def _write_atomically(path: pathlib.Path, lines: Iterable[str]) -> int:
    """Returns the number of lines."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            count = sum(bool(file.write(line + "\n")) for line in lines)
            file.flush()
            os.fsync(file.fileno())  # so that a crash leaves the old file or the new one
        partial.replace(path)
        return count
    except OSError as error:
        raise errors.UserError(f"{path} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
