"""What happens to a row that cannot be read: the run stops, or the row is skipped and counted.

Stopping is the default. Skipping is never silent: the first row of each kind is logged at once, all
are counted by file and reason, and commands end with the counts. Only rows can be skipped: a file
that is missing or cannot be read at all stops a run either way.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import logging
import pathlib
from typing import Literal, TypeVar

import gin

from moe_peft import errors

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")
Counts = Mapping[tuple[str, str], int]  # by (file, reason)


class BadRow(errors.UserError):
    """A row that cannot be read.

    `path` is its file, `row` says which, such as "row 3"; `reason` what is wrong, in the same words
    for all rows with the same mistake; `seen` what stands there, for people.
    """

    def __init__(self, path: pathlib.Path | str, row: str, reason: str, seen: str = ""):
        self.path, self.row, self.reason = str(path), row, reason
        message = f"{path}, {row}: {reason}{f': {seen}' if seen else ''}"
        super().__init__(message if message.endswith("?") else f"{message}.")

    def __reduce__(self):
        # A process hands it to another as what it says.
        return errors.UserError, (str(self),)


@gin.configurable(module="bad_rows")
def configured(action: Literal["stop", "skip"] = "stop") -> str:
    """What gin sets: `bad_rows.configured.action = %BAD_ROWS`.

    Args:
      action: "stop" at the first bad row, or "skip" and count it.
    """
    return action


_skipped: collections.Counter[tuple[str, str]] = collections.Counter()
_forced: list[dict[tuple[str, str], list[BadRow]]] = []
_EXAMPLES = 5
_uncounted: list[None] = []


def is_skipping() -> bool:
    """Whether bad rows are skipped."""
    return bool(_forced) or configured() == "skip"


@contextlib.contextmanager
def skipping() -> Iterator[Mapping[tuple[str, str], list[BadRow]]]:
    """Inside, bad rows are skipped, even if gin says "stop"; yields the first few of each kind."""
    found: dict[tuple[str, str], list[BadRow]] = {}
    _forced.append(found)
    try:
        yield found
    finally:
        _forced.pop()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Inside, bad rows are left out without a word: the file is read again later."""
    _uncounted.append(None)
    try:
        yield
    finally:
        _uncounted.pop()


def skip_row(row: BadRow, count: int = 1) -> None:
    """Counts a row, or `count` of them, as skipped; raises it where rows are not skipped."""
    if _uncounted:
        return
    if not is_skipping():
        raise row
    key = (row.path, row.reason)
    if key not in _skipped and not _forced:
        logging.warning("Skipped: %s Further rows like this one are only counted.", row)
    _skipped[key] += count
    for found in _forced:
        if len(first := found.setdefault(key, [])) < _EXAMPLES:
            first.append(row)


def parsed(parse: Callable[[Item], Parsed], items: Iterable[Item]) -> Iterator[Parsed]:
    """`parse` of each item, without those that it refuses with a `BadRow` (see `skip_row`)."""
    for item in items:
        try:
            found = parse(item)
        except BadRow as row:
            skip_row(row)
            continue
        yield found


def skipped() -> Counts:
    """What this process has skipped so far."""
    return dict(_skipped)


@contextlib.contextmanager
def counting() -> Iterator[dict[tuple[str, str], int]]:
    """Yields a dictionary that holds, afterwards, what was skipped inside."""
    before, found = _skipped.copy(), {}
    try:
        yield found
    finally:
        found.update(_skipped - before)


def remember_skipped(counts: Counts) -> None:
    """Adds rows that were skipped earlier, when a cache was made, or in another process."""
    if counts:
        logging.warning("%s (when the cache was made).", summary(counts))
    _skipped.update(counts)


def summary(counts: Counts) -> str:
    """One line."""
    listed = "; ".join(f"{path}: {reason} ({count})" for (path, reason), count in counts.items())
    return f"Skipped {sum(counts.values())} bad rows: {listed}"
