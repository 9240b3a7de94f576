"""Errors that a person can mend, in one line."""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
    """What was expected, what came and what to try, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """


def near(name: str, options: Iterable[str], limit: int = 3) -> str:
    """Returns " Did you mean 'x'?" with the options closest to `name`, or "" if none is close.

    >>> near("molro", ["mov", "molora", "lora"])
    " Did you mean 'molora' or 'lora'?"
    """
    found = difflib.get_close_matches(name, list(options), n=limit, cutoff=0.6)
    if not found:
        return ""
    return " Did you mean " + " or ".join(repr(option) for option in found) + "?"
