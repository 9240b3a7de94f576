"""Generated rows, written once to the cache folder and read from it afterwards.

A file's name tells babel's version and this package's source: rows of others are never read.
"""

from collections.abc import Callable
import functools
import hashlib
import logging
import os
import pathlib
import tempfile
import zipfile

import babel
import numpy as np

from moe_peft.data import cache

Columns = dict[str, np.ndarray]


@functools.cache
def fingerprint() -> str:
    """Changes whenever generated rows could."""
    digest = hashlib.sha256(babel.__version__.encode())
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cached(name: str, make: Callable[[], Columns]) -> Columns:
    """The columns called `name`: read if present, otherwise made and written.

    A damaged file, or a folder that cannot be written, is a warning, and rows are made again.
    """
    path = cache.folder() / f"{name}-{fingerprint()}.npz"
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            return dict(stored)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        logging.warning("Making %s again: %s", path, problem)
    columns = make()
    try:  # renamed when done: processes that start together cannot read half of a file
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **columns)
        os.replace(temporary, path)
    except OSError as problem:
        logging.warning("Rows are not cached (%s); set MOE_PEFT_CACHE.", problem)
    return columns
