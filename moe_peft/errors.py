"""Errors that a person can fix, in one line."""

from collections.abc import Iterable
import difflib

EXIT_CODE = 2  # of the command line, for what a person can fix


class UserError(ValueError):
    """What was expected, what came and what to try, in one line.

    The command line prints the message without a traceback and exits with `EXIT_CODE`.
    """


def twice(names: Iterable[str]) -> str | None:
    """Returns the first name that came before, or None.

    >>> twice(["a", "b", "a"])
    'a'
    """
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def check_one_of(what: str, value: object, options: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of the options."""
    options = tuple(options)
    if value not in options:
        raise UserError(
            f"{what} is {value!r}; expected one of {', '.join(options)}."
            + near(str(value), options)
        )


def check_at_least(what: str, value: float, least: float) -> None:
    """Raises UserError unless `value` is a number of `least` or more; NaN is not."""
    if not value >= least:
        raise UserError(f"{what} is {value}; expected {least} or more.")


def check_between(what: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless `low <= value <= high`; NaN is not."""
    if not low <= value <= high:
        raise UserError(f"{what} is {value}; expected a number from {low} to {high}.")


def near(name: str, options: Iterable[str], limit: int = 3) -> str:
    """Returns " Did you mean 'x'?" with the options closest to `name`, or "" if none is close.

    >>> near("molro", ["mov", "molora", "lora"])
    " Did you mean 'molora' or 'lora'?"
    """
    found = difflib.get_close_matches(name, list(options), n=limit, cutoff=0.6)
    if not found:
        return ""
    return " Did you mean " + " or ".join(repr(option) for option in found) + "?"
