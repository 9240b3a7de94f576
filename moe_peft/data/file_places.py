"""Where a user's rows are: files, folders, splits by name."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
from typing import Any

from moe_peft import errors
from moe_peft.data import plain_files, roots

TRAIN, VALIDATION = "train", "validation"
Paths = str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, Any]
# Beginnings of the names of files in a folder that say which split they are.
_SPLITS = {TRAIN: ("train",), VALIDATION: ("validation", "valid", "dev", "eval"), "test": ("test",)}


def by_split(data: Paths, default: str) -> dict[str, list[pathlib.Path]]:
    """Files by split; those that name none are of `default`."""
    if isinstance(data, Mapping):
        for split in data:
            errors.check_one_of("A split of data", split, _SPLITS)
        return {split: by_split(paths, split)[split] for split, paths in data.items()}
    found: dict[str, list[pathlib.Path]] = {}
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not paths:
        raise errors.UserError(f"There is no file of the split {default!r}; expected at least one.")
    for path in map(pathlib.Path, paths):
        path = path.expanduser()
        if not path.is_dir():
            found.setdefault(default, []).append(path)
            continue
        inside = sorted(each for each in path.iterdir() if each.suffix in plain_files.SUFFIXES)
        if not inside:
            expected = ", ".join(plain_files.SUFFIXES)
            raise errors.UserError(f"The folder {path} has no file that ends in {expected}.")
        splits = [_split_of(each) for each in inside]
        for each, split in zip(inside, splits, strict=True):
            own = (split or default) if default == TRAIN and TRAIN in splits else default
            found.setdefault(own, []).append(each)
    return found


def _split_of(path: pathlib.Path) -> str | None:
    stems = ((split, stem) for split, stems in _SPLITS.items() for stem in stems)
    return next((split for split, stem in stems if path.stem.startswith(stem)), None)


def are_files(name: str) -> bool:
    """Whether a name is a place of rows: neither a task nor a folder of benchmarks."""
    path = pathlib.Path(name).expanduser()
    if not path.is_dir():
        return path.is_file() or path.suffix in plain_files.SUFFIXES
    inside = list(path.iterdir())
    has_rows = any(each.suffix in plain_files.SUFFIXES for each in inside)
    return has_rows and not any(each.name in roots.LAYOUT for each in inside)


def sign(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int]]:
    """What tells when a file was changed."""
    stats = ((path.resolve(), path.stat()) for path in files)
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def safe(name: str) -> str:
    """The name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name) or "_"
